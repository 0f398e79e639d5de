"""Checkpoints in and out: Hugging Face, mlx-lm and GGUF in; quantized and exported out."""

if __name__ != "ifp_mlx.convert":  # the folder is linked as ifp_mlx/convert; one import name only
    raise ImportError("import ifp_mlx.convert, not convert")
