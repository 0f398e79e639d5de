"""The command line: parse, call one library function, render."""

if __name__ != "ifp_mlx.cli":  # the folder is linked as ifp_mlx/cli; one import name only
    raise ImportError("import ifp_mlx.cli, not cli")
