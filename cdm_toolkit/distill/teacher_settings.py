"""Settings of a teacher: where its signal comes from, the method that distills it, and the method's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails

from cdm_toolkit.alignment.aligners import AlignerName
from cdm_toolkit.artifacts.settings import (
    Count,
    CountOrNone,
    Positive,
    Record,
    Settings,
    Text,
    one_or_several,
)
from cdm_toolkit.errors import UnknownName
from cdm_toolkit.kd.method import Method, find_method, methods
from cdm_toolkit.kd.settings import (
    DEFAULT_TOP_K,
    Fault,
    Faults,
    MethodSettings,
    checked,
    fields_of,
    unknown_setting,
)

DEFAULT_METHOD = "spelling"
"""The method of a teacher that names none."""
ACROSS_TOKENIZERS = ("aligner", "entropy")
"""Settings of a teacher that a method for one tokenizer has no use for."""
WeightsDtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["4bit", "8bit"]
DeviceMap = Text | dict[Text, Text | CountOrNone]
PLACEMENT = ("device", "device_map", "quantization")
"""Settings of a teacher that say where its model lies, and how small."""
OF_A_SERVER = ("url", "engine", "api_key_env", "in_flight", "timeout", "patience")
OF_A_KIND: Mapping[str, tuple[str, ...]] = {
    "local": ("dtype", *PLACEMENT),
    "cached": ("cache",),
    "distillkit": ("compression",),
    "served": (*OF_A_SERVER, "cache"),
}
"""Settings that only teachers of some kinds have a use for."""


def _server(url: str) -> str:
    """Check the address of a server; gives it without a slash at the end."""
    parts = urlsplit(url)
    if "@" in url or parts.query or parts.fragment:
        raise ValueError("has a key or a password in it: api_key_env names the variable that holds the key")
    try:
        is_port = parts.port != 0
    except ValueError:
        is_port = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_port:
        raise ValueError(f"{url!r} is no address of a server: give one such as http://localhost:8000")
    if parts.path.strip("/"):
        raise ValueError(f"{url!r} has a path too many: give {parts.scheme}://{parts.netloc}")
    return url.rstrip("/")


Server = Annotated[Text, AfterValidator(_server)]


class TeacherSource(Settings):
    """Where a teacher is: a model here, or one behind servers."""

    model: Text
    """The model to learn from: an alias, a folder or a hub id; of a served one the name that its server has for it."""
    tokenizer: Text | None = None
    """Its tokenizer: an alias, a folder or a hub id; the model's unless it is given."""
    url: Annotated[tuple[Server, ...], BeforeValidator(one_or_several)] = ()
    """Of the server, such as http://localhost:8000; several serve the same model, and share the load."""
    engine: Literal["vllm", "sglang"] = "vllm"
    """What the server runs."""
    api_key_env: Text | None = None
    """Name of the environment variable that holds the server's key, where it asks for one."""
    in_flight: Count = 32
    """Requests that are open at once, in each process; the rows of the next batches are asked for while the student
    trains."""
    timeout: Positive = 120.0
    """Seconds after which a request is given up, and made again."""
    patience: Positive = 300.0
    """Seconds to wait for a server that does not answer, before the run stops with a checkpoint."""

    @property
    def tokenizer_name(self) -> str:
        """Name what its tokenizer is loaded from."""
        return self.tokenizer or self.model


class TeacherConfig(TeacherSource):
    """A teacher, the method that distills it, and the method's own settings.

    Beside the fields here it takes those of the method's `Settings`; one that the method does not have is a fault.
    """

    model_config = ConfigDict(extra="allow")

    kind: Literal["local", "cached", "served", "distillkit"] = "local"
    """Where its signal comes from. local: the model in memory. cached: log-probabilities of a `cache`. served: a model
    behind a `url`. distillkit: log-probabilities that are in the rows, which are a set of DistillKit's. Without it the
    other settings tell."""
    method: Text = DEFAULT_METHOD
    """What is learned from the teacher: the name of a method of `kd`."""
    weight: Positive = 1.0
    """Of this teacher's KD among all."""
    cache: Text | None = None
    """Folder of cached log-probabilities, in place of the model in memory; of a served one, where its answers are kept
    (in the output folder unless given)."""
    compression: Text | None = None
    """Of kind distillkit: the file that says how the set is compressed, where no compression_config.yaml is beside it;
    a run file of DistillKit that reads the set will do."""
    dtype: WeightsDtype | None = None
    """Of the weights of the model in memory: float32 unless it is set; auto: as they are stored. What is quantised
    keeps its own."""
    device: Text | None = None
    """Of the model in memory: cpu, cuda, cuda:1, …, or mps; the student's unless it is set."""
    device_map: DeviceMap | None = None
    """Layers of the model in memory over several devices, by accelerate: auto, balanced, balanced_low_0, sequential,
    or devices by the names of modules, such as `{model: cuda:1, lm_head: cuda:2}`."""
    quantization: Quantization | None = None
    """Quantise the weights by bitsandbytes as they are read, where the checkpoint is not quantised already."""
    aligner: AlignerName = "anchored"
    """anchored and bytes: exact groups by bytes. entropy-dtw, dtw: least cost of edit distances."""
    entropy: Literal["uniform", "models"] = "uniform"
    """Weights of tokens in entropy-dtw: uniform, or models: the entropies of both models' predictions before
    training (a pass of each over the data)."""

    @model_validator(mode="wrap")
    @classmethod
    def _fits_the_method(cls, given: Any, handler: ModelWrapValidatorHandler[TeacherConfig]) -> TeacherConfig:
        """Check the method's settings, also where a field has a fault: all are listed at once."""
        if not isinstance(given, Mapping):
            return handler(given)
        settings, faults = _method_settings(given)
        kind = given.get("kind") or _kind(given)
        faults += _of_the_kind(kind, given)
        faults += placement_faults(given)
        made = listed_together(faults, handler, {**given, **settings, "kind": kind})
        if "kind" not in given:  # a copy with other settings may be of another
            made.__pydantic_fields_set__.discard("kind")
        return made

    @property
    def method_class(self) -> type[Method[Any, Any]]:
        return find_method(self.method)

    @property
    def method_options(self) -> dict[str, Any]:
        """Give the method's settings that are set."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def method_settings(self) -> MethodSettings:
        """Give the method's settings, defaults included."""
        return self.method_class.Settings(**self.method_options)

    @property
    def options(self) -> dict[str, Any]:
        """Give all that decides what is taught, defaults included, in values that JSON has."""
        settings = self.method_settings
        found = {field.name: getattr(settings, field.name) for field in fields_of(type(settings))}
        if "top_k" in found:
            found["top_k"] = found["top_k"] or DEFAULT_TOP_K
        across = (
            {}
            if self.method_class.same_tokenizer
            else {name: getattr(self, name) for name in ACROSS_TOKENIZERS}
        )
        return {"method": self.method} | across | found


def _kind(given: Mapping[str, Any]) -> str:
    return "served" if given.get("url") else "cached" if given.get("cache") else "local"


def _of_the_kind(kind: Any, given: Mapping[str, Any]) -> Iterator[Fault]:
    """Find settings that a teacher of this kind has no use for, and those that it lacks."""
    if "api_key" in given:
        yield Fault("api_key", "has no place in a file: api_key_env names the variable that holds the key")
    if kind not in OF_A_KIND:
        return
    own = {*OF_A_KIND[kind], *(OF_A_KIND["local"] if given.get("entropy") == "models" else ())}
    of_others = {name for names in OF_A_KIND.values() for name in names} - own
    for name in sorted(of_others & {name for name, value in given.items() if value is not None}):
        yield Fault(name, f"is of no use to a teacher of kind {kind}")
    if kind in ("served", "distillkit") and given.get("entropy") == "models":
        yield Fault("entropy", f"models is of a model in memory, which a teacher of kind {kind} has not")
    needed = {"cached": "cache", "served": "url"}.get(kind)
    if needed and not given.get(needed):
        yield Fault(needed, f"is missing: a teacher of kind {kind} needs it")


def _method_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Give a teacher's method by its name and the method's settings as they are kept, and what is wrong."""
    name = given.get("method", DEFAULT_METHOD)
    options = {
        name: value for name, value in given.items() if name not in (*TeacherConfig.model_fields, "api_key")
    }
    if not isinstance(name, str):
        return {}, []
    try:
        method = find_method(name)
    except UnknownName as error:
        return {}, [Fault("method", f"is {name!r}: {error.fix}"), *_faults_anywhere(options)]
    values, others = checked(method.Settings, options)
    faults = [*_old_names(options), *_useless(method, given)]
    named = {fault.name for fault in faults}
    faults += [_in_context(fault, method) for fault in others if fault.name not in named]
    return values | ({"method": method.name} if "method" in given else {}), faults


def _faults_anywhere(options: Mapping[str, Any]) -> list[Fault]:
    """Check settings of a method that nobody knows as the first method has them that has one of the name."""
    kinds = list(methods().values())
    owners = {name: next((kind for kind in kinds if name in _setting_names(kind)), None) for name in options}
    return [
        fault
        for name, owner in owners.items()
        if owner is not None
        for fault in checked(owner.Settings, {name: options[name]})[1]
    ]


def _useless(method: type[Method[Any, Any]], given: Mapping[str, Any]) -> Iterator[Fault]:
    """Find settings of a teacher that do not go with its method or with one another."""
    if method.same_tokenizer:
        for name in ACROSS_TOKENIZERS:
            if name in given:
                yield Fault(name, f"is of no use to {method.name}, which is for one tokenizer")
        return
    for name in ("cache", "url"):
        if given.get(name) and given.get("positions") == "mean":
            yield Fault(
                name, "has no whole logits, which positions mean needs: leave it out, or take boundary"
            )
    if given.get("kind") == "distillkit" and given.get("positions") == "mean":
        yield Fault(
            "positions", "mean needs whole logits, which a set of DistillKit's has not: take boundary"
        )
    aligner = given.get("aligner", TeacherConfig.model_fields["aligner"].default)
    if given.get("entropy") == "models" and aligner != "entropy-dtw":
        yield Fault("entropy", f"models is of no use to aligner {aligner}, only to entropy-dtw")


def placement_faults(given: Mapping[str, Any], *, dtype: str = "dtype") -> Iterator[Fault]:
    """Find settings of how a teacher is loaded that do not go together; `dtype` names that of its weights."""
    if given.get("device_map") is not None and given.get("device") not in (None, "auto"):
        yield Fault("device", "goes not with device_map, which has a device for each part: leave one out")
    if given.get("quantization") is not None and given.get(dtype) not in (None, "auto"):
        yield Fault(dtype, "goes not with quantization, which leaves the rest as it is stored: leave one out")


def listed_together(
    faults: list[Fault], handler: ModelWrapValidatorHandler[Record], given: Mapping[str, Any]
) -> Record:
    """Make a record of settings. Raises `faults` beside those that pydantic finds."""
    try:
        made = handler(given)
    except ValidationError as error:
        raise _with_faults(error, faults) from None
    if faults:
        raise Faults(faults)
    return made


def _with_faults(error: ValidationError, faults: list[Fault]) -> ValidationError:
    """Add faults to those that pydantic has found."""
    lines = [
        InitErrorDetails(type=line["type"], loc=line["loc"], input=line["input"], ctx=line.get("ctx", {}))
        for line in error.errors(include_url=False)
    ]
    if faults:
        lines.append(InitErrorDetails(type="value_error", loc=(), input=None, ctx={"error": Faults(faults)}))
    return ValidationError.from_exception_data(error.title, lines)


def _old_names(options: Mapping[str, Any]) -> list[Fault]:
    """Name the method that `mapping` chose before `cdm` and `spelling` were two methods."""
    mapping = options.get("mapping")
    if mapping is None:
        return []
    wanted = "cdm" if mapping == "near" else "spelling"
    return [Fault("mapping", f"is gone: give method {wanted}, which is what mapping {mapping} was")]


def _in_context(fault: Fault, method: type[Method[Any, Any]]) -> Fault:
    """Say of an unknown setting whether other methods have it, or which of all settings is meant."""
    own = [field.name for field in fields_of(method.Settings)]
    if fault.name in own:
        return fault
    if any(fault.name in _setting_names(other) for other in methods().values()):
        return Fault(fault.name, f"is of no use to {method.name}: it has {', '.join(own)}")
    return Fault(fault.name, unknown_setting(fault.name, [*own, *TeacherConfig.model_fields]))


def _setting_names(method: type[Method[Any, Any]]) -> set[str]:
    return {field.name for field in fields_of(method.Settings)}
