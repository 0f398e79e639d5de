"""Any supported checkpoint turned into an mlx-lm checkpoint directory."""

import dataclasses
import logging
import shutil
from pathlib import Path

import mlx.core as mx

from ifp_mlx.chat.chat_template import try_chat_template
from ifp_mlx.convert.checkpoint_writer import copy_tokenizer_files, model_bytes, write_model
from ifp_mlx.convert.gguf_conversion import converted_bytes, write_gguf_checkpoint
from ifp_mlx.convert.gguf_reader import GGUFFile
from ifp_mlx.convert.progress import Progress, no_progress
from ifp_mlx.convert.quantize import Quantization, write_quantized
from ifp_mlx.errors import CheckpointError
from ifp_mlx.slicing.unit_file import write_unit_file
from ifp_mlx.storage.files import require_free_disk, staged_directory
from ifp_mlx.storage.origin import Origin, read_origin, write_origin
from ifp_mlx.storage.tokenizer import load_tokenizer
from ifp_mlx.storage.weights import load_model, stored_tensors

logger = logging.getLogger(__name__)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        num_bytes: size of the weights on disk.
        dtype: of the values that are not packed.
    """

    path: Path
    model_type: str
    num_bytes: int
    dtype: str


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: mx.Dtype | None = None,
    quantization: Quantization | None = None,
    unit_major: bool = False,
    overwrite: bool = False,
    origin: Origin | None = None,
    progress: Progress = no_progress,
) -> Conversion:
    """Write ``source`` as an mlx-lm checkpoint to the directory ``target``, whole or not at all.

    Args:
        source: a Hugging Face or mlx-lm checkpoint directory, or a GGUF file.
        target: a directory that does not exist yet.
        dtype: floating type of the result. None keeps a directory's own; for a GGUF file it is
            float32 (exact) on the CPU, where nothing else is fast, and bfloat16 on a GPU.
        quantization: quantize the result; packed tensors of the source are packed anew.
        unit_major: also store the FFN units one by one, as ``ifp convert --unit-major`` does.
        overwrite: replace ``target`` if it exists.
        origin: where the values come from, to be kept with them.
        progress: called while reading and writing.

    Raises:
        CheckpointError: the source cannot be read, is damaged or is not safe to read.
        ArchitectureError: the family is not supported.
        ResourceError: not enough disk.
        UsageError: the target exists.
    """
    if source.suffix in _PICKLED:
        raise CheckpointError(
            f"{source} is a pickle file, which can run code when read; use the model's "
            "safetensors or GGUF files"
        )
    if source.suffix == ".safetensors":
        raise CheckpointError(f"{source} is one file of a checkpoint; give the folder it is in")
    if not source.exists():
        raise CheckpointError(f"there is no {source}: neither a checkpoint folder nor a GGUF file")
    with staged_directory(target, overwrite=overwrite) as staging:
        file = None if source.is_dir() else GGUFFile(source)
        if file is not None:
            dtype = dtype or (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
            require_free_disk(target, converted_bytes(file, dtype))
        if quantization is None:
            _write(file or source, staging, dtype, progress)
        elif file is None:
            write_quantized(source, staging, quantization, dtype=dtype, progress=progress)
        else:
            plain = staging / "plain"
            plain.mkdir()
            _write(file, plain, dtype, progress)
            write_quantized(plain, staging, quantization, progress=progress)
            shutil.rmtree(plain)
        write_origin(staging, origin or _origin_of(source, file))
        # What is put in place can be read by mlx-lm.
        _, config = load_model(staging, lazy=True)
        if (problem := try_chat_template(load_tokenizer(staging))) is not None:
            logger.warning("%s", problem.replace(str(staging), str(target)))
        if unit_major:
            write_unit_file(staging, on_bytes=lambda *amounts: progress("preparing", *amounts))
        num_bytes = sum(tensor.num_bytes for tensor in stored_tensors(staging).values())
    return Conversion(target, config["model_type"], num_bytes, str(config.get("torch_dtype")))


def _write(
    source: Path | GGUFFile, staging: Path, dtype: mx.Dtype | None, progress: Progress
) -> None:
    if isinstance(source, GGUFFile):
        write_gguf_checkpoint(source, staging, dtype or mx.float32, progress)
        return
    model, config = load_model(source, lazy=True)
    total = model_bytes(model, dtype)
    require_free_disk(staging, total)
    write_model(
        model, config, staging, dtype=dtype,
        on_bytes=lambda done: progress("converting", done, total),
    )  # fmt: skip
    copy_tokenizer_files(source, staging)


def _origin_of(source: Path, file: GGUFFile | None) -> Origin:
    """Return what the source itself says about where it comes from."""
    if file is None:
        return read_origin(source)
    licence = file.metadata.get("general.license")
    return Origin(licence=licence if isinstance(licence, str) else None, source=source.name)
