"""Model folders in Hugging Face's form: config.json beside model.safetensors.

    model.safetensors                    the weights; or, of a large model,
    model-00001-of-00002.safetensors …   shards of them, and
    model.safetensors.index.json         {"weight_map": {name of a tensor: file that holds it}}

`PretrainedModel` is the Module with `save_pretrained` and `from_pretrained`; below it stand the
files. One kind of file is JSON, the other is numbers, and no pickle is read: opening a folder runs
nobody's code.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from tinygrad_llm import backend, storage
from tinygrad_llm.backend import Array
from tinygrad_llm.models import hub
from tinygrad_llm.nn import Module, Parameter, init
from tinygrad_llm.storage import Damaged, save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

_Config = TypeVar("_Config")


class PretrainedModel(Module):
    """A Module with a config that goes into a folder of Hugging Face's form, and comes back.

    An architecture derives from it, calls `super().__init__(config)`, and says what is particular:

        config_class    what `config.json` becomes: it has `from_dict` and `to_dict`
        architecture    the class of `transformers` that opens the folder
        base            the attribute with the network below the head, such as 'bert'; a file of
                        that network alone has no such word before its names, and is read, too
        optional        beginnings of names in the base that a file may lack, or have in vain
        obsolete        ends of names in old files that nobody needs
        transposed      ends of the names of matrices that files keep as (in, out)
        own_name        the name of today for one of an older file
        init_parameter  the first values of a parameter
    """

    config_class: ClassVar[Any]
    architecture: ClassVar[str]
    base: ClassVar[str] = ""
    optional: ClassVar[tuple[str, ...]] = ()
    obsolete: ClassVar[tuple[str, ...]] = ()
    transposed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def own_name(cls, name: str) -> str:
        """The name that a file's tensor has here."""
        return name

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """Write the first values of the parameter of that name (`nn.init`)."""
        raise NotImplementedError(f"{type(self).__name__} says nothing of first values: {name}")

    def reset_parameters(self) -> None:
        """Draw all weights anew, in the order of `named_parameters()`."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    # --- folders ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and model.safetensors, as `transformers` reads and writes them.

        Weights beyond `max_shard_size` (bytes, or such as "500MB") go into several files and an
        index of them; one that has two names is written once. Raises OSError where they cannot be
        written; what was there is then whole.
        """
        once = dict(self.named_parameters())
        twice = dict(self.named_parameters(remove_duplicate=False)).keys() - once.keys()
        arrays = {n: t.data for n, t in self.state_dict().items() if n not in twice}
        dtypes = [array.dtype for array in arrays.values() if backend.is_float(array.dtype)]
        config = self.config.to_dict() | {"architectures": [self.architecture]}
        if dtypes:
            config["torch_dtype"] = str(dtypes[0])
        arrays = {n: a.T if self._is_transposed(n) else a for n, a in arrays.items()}
        save_folder(folder, config, arrays, max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: Any = None,
        *,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        **changes: Any,
    ) -> Self:
        """The model in `folder`, or of that name on the Hugging Face hub, after `eval()`.

        The file may be of the same network with another head, or with none: what it does not have
        begins anew, and a `NewWeights` warning says so in one sentence (`load` says it without a
        warning). Where SHA256SUMS lies beside the weights, as in our checkpoints, the files are
        compared with it first.

        Args:
            folder: a path, or a name on the hub (see `hub.find`).
            dtype: of the weights; None: the one that they have in the file, the widest where they
                have several.
            revision: of the repository on the hub.
            ignore_mismatched_sizes: begin a head anew that has other sizes in the file, such as
                for another number of labels, instead of refusing it.
            changes: options of the config in place of those in config.json, such as num_labels.

        Raises:
            TypeError: `changes` has what is no option.
            FileNotFoundError: config.json or model.safetensors, or a shard of it, is missing.
            ValueError: a file is damaged, is of another kind of model, or they disagree. Nothing
                large is allocated before that is known.
        """
        model, loaded = cls.load(
            folder,
            dtype,
            revision=revision,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **changes,
        )
        if loaded.new:
            warnings.warn(f"{folder}: {loaded}", NewWeights, stacklevel=2)
        return model

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: Any = None,
        *,
        revision: str | None = None,
        ignore_mismatched_sizes: bool = False,
        **changes: Any,
    ) -> tuple[Self, Loaded]:
        """(the model, what did not fit): as `from_pretrained`, without its warning."""
        _check_options(cls.config_class, changes)
        folder = hub.find(folder, revision)
        check_folder(folder)
        config = read_config(folder, partial(_make_config, cls.config_class, changes))
        weights = Weights(folder)
        try:
            with init.placeholders():
                model = cls(config)
            fit = _Fit(model, weights, ignore_mismatched_sizes)
            dtype = _common_dtype(weights, fit.sources.values()) if dtype is None else dtype
            arrays = fit.arrays(backend.as_dtype(dtype))
        except ValueError as error:
            raise weights.damaged(error) from error
        model.load_state_dict(arrays, strict=False, assign=True)
        own = dict(model.named_parameters())
        for name in fit.loaded.new:
            own[name].data = np.empty(own[name].shape, backend.as_dtype(dtype))
            model.init_parameter(name, own[name])
        return model.eval(), fit.loaded

    @classmethod
    def _is_transposed(cls, name: str) -> bool:
        return bool(cls.transposed) and name.endswith(cls.transposed)


class NewWeights(UserWarning):
    """A checkpoint lacks weights of the model, which therefore begin at random."""


@dataclass(frozen=True)
class Loaded:
    """How a checkpoint fitted a model.

    Attributes:
        new: parameters that the checkpoint lacks (or has in other sizes), which begin at random.
        unused: tensors of the checkpoint, such as those of another head, that the model has not.
    """

    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        if self.new:
            parts.append(
                f"the checkpoint has no {_some(self.new)}: new at random, so train the model "
                "before you use it"
            )
        if self.unused:
            parts.append(f"of the checkpoint {_some(self.unused)} was not used")
        return "; ".join(parts) or "the checkpoint fits"


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# What says how many labels there are: where one of them is changed, the others in config.json go.
_LABELS = {"num_labels", "id2label", "label2id"}


def _make_config(kind: Any, changes: Mapping[str, Any], found: dict[str, Any]) -> Any:
    if _LABELS & changes.keys():
        found = {key: value for key, value in found.items() if key not in _LABELS}
    return kind.from_dict({**found, **changes})


def _check_options(kind: Any, changes: Mapping[str, Any]) -> None:
    """Raise TypeError for what the config does not know: from_dict passes over it in silence."""
    known = [option.name for option in fields(kind)]
    for name in changes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"from_pretrained(): {kind.__name__} has no option {name!r}{hint}")


class _Fit:
    """Which tensor of a file is which parameter of a model, by names without the base's.

    Raises ValueError where the file is of another network: one of the base is missing, is there
    twice, is there in vain or has another size.
    """

    def __init__(self, model: PretrainedModel, weights: Weights, renew_misfits: bool) -> None:
        self.model, self.weights = model, weights
        self.sources: dict[str, str] = {}  # our name of a tensor: the file's
        self.loaded = Loaded()
        self._parts = self._parts_of_base()
        self._shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        there = self._names_in_file()
        for names in self._shared_names():
            found = [name for name in names if self._bare(name) in there]
            self._check_tied(found, there)
            if not found:
                self._begin_anew(names[0], f"it has no {names[0]}, which config.json asks for")
                continue
            source = there[self._bare(found[0])]
            if misfit := self._misfit(found[0], source):
                if not renew_misfits:
                    misfit += self._advice(found[0])
                    raise ValueError(misfit)
                self._begin_anew(names[0], misfit)
            else:
                self.sources[names[0]] = source
            for name in names:
                there.pop(self._bare(name), None)
        for bare, name in there.items():
            if self._is_needed(bare):
                raise ValueError(f"it holds {name}, for which config.json has no place")
            self.loaded.unused.append(name)

    def arrays(self, dtype: np.dtype) -> dict[str, Array]:
        """The tensors as the model keeps them: (out, in), floats in the one dtype."""
        return {name: self._array(name, source, dtype) for name, source in self.sources.items()}

    def _array(self, name: str, source: str, dtype: np.dtype) -> Array:
        array = self.weights[source]
        array = array.T if self.model._is_transposed(name) else array
        kept = array.dtype if not backend.is_float(array.dtype) else dtype
        return np.array(array, dtype=kept, order="C", copy=None)

    def _bare(self, name: str) -> str:
        return name.removeprefix(f"{self.model.base}.")

    def _parts_of_base(self) -> set[str]:
        """The first words of bare names that belong to the network below the head."""
        base = getattr(self.model, self.model.base) if self.model.base in vars(self.model) else None
        owner = self.model if base is None else base
        return {name.split(".")[0] for name in owner.state_dict()}

    def _is_needed(self, bare: str) -> bool:
        """Whether it is of the network itself and not of a head."""
        return bare.split(".")[0] in self._parts and not bare.startswith(self.model.optional)

    def _names_in_file(self) -> dict[str, str]:
        """{bare name: name in the file}"""
        there: dict[str, str] = {}
        for name in sorted(self.weights.shapes):
            if self.model.obsolete and name.endswith(self.model.obsolete):
                continue
            bare = self._bare(self.model.own_name(name))
            if bare in there:
                raise ValueError(f"it holds {bare} twice, as {there[bare]} and as {name}")
            there[bare] = name
        return there

    def _shared_names(self) -> Iterable[list[str]]:
        """The names of the model's tensors, those of one and the same together."""
        tensors: dict[str, Any] = dict(self.model.state_dict())
        tensors |= dict(self.model.named_parameters(remove_duplicate=False))
        groups: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(id(tensor), []).append(name)
        return groups.values()

    def _check_tied(self, names: list[str], there: Mapping[str, str]) -> None:
        first, *others = [there[self._bare(name)] for name in names] or [""]
        for other in others:
            if not np.array_equal(self.weights[first], self.weights[other]):
                raise ValueError(f"its {first} and {other} differ, and are one and the same here")

    def _misfit(self, name: str, source: str) -> str:
        """What is wrong with the size of the file's tensor, or ''."""
        shape = self.weights.shapes[source]
        shape = shape[::-1] if self.model._is_transposed(name) else shape
        wanted = self._shapes[name]
        return "" if shape == wanted else f"its {source} has the shape {shape}, not {wanted}"

    def _advice(self, name: str) -> str:
        if self._is_needed(self._bare(name)):
            return " as by config.json"
        labels = getattr(self.model.config, "num_labels", None)
        of = f", which num_labels = {labels} needs" if labels else ""
        return f"{of}: ignore_mismatched_sizes=True begins this head anew"

    def _begin_anew(self, name: str, otherwise: str) -> None:
        """Note that the parameter is new; ValueError where that would be another network."""
        if self._is_needed(self._bare(name)):
            raise ValueError(otherwise)
        self.loaded.new.append(name)


def _common_dtype(weights: Weights, names: Iterable[str]) -> np.dtype:
    """The dtype that holds every float weight to the last bit."""
    dtypes = {weights.dtypes[name] for name in names}
    floats = [dtype for dtype in dtypes if backend.is_float(dtype)]
    if not floats:
        raise ValueError(f"weights need a float dtype, got {', '.join(map(str, dtypes)) or 'none'}")
    return reduce(backend.promote, floats)


# --- writing --------------------------------------------------------------------------------------


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    arrays: Mapping[str, Array],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json and the weights, making the folder where there is none.

    Weights larger than `max_shard_size` (bytes, or such as "500MB") go into several files with an
    index. What the folder held before is replaced only when everything new is written to its end.
    ValueError for weights of `nn.quantize_`, for which these folders have no names.
    """
    few_bits = next((name for name in arrays if name.endswith(".packed")), None)
    if few_bits is not None:
        raise ValueError(
            f"a model folder holds floats, but {few_bits} are quantised: save the model before "
            "quantize_(), and quantise it again after loading"
        )
    folder = Path(folder)
    limit = as_bytes(max_shard_size)
    contents: dict[str, Callable[[Path], object]] = {}
    shards = _shards(arrays, limit)
    for name, part in shards.items():
        contents[name] = partial(save_file, part)
    if len(shards) > 1:
        contents[INDEX] = _text(_index(shards), sort_keys=True)
    contents[CONFIG] = _text(config)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, contents)


def as_bytes(size: int | str) -> int:
    """500 from 500, 5 · 10⁹ from "5GB", 5 · 2³⁰ from "5GiB"; ValueError for what is no size."""
    match = re.fullmatch(r"(\d+) *([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    number = int(match[1]) if match and not isinstance(size, bool) else 0
    if not match or number < 1:
        raise ValueError(f"max_shard_size must be a size such as '5GB' or 10**9, got {size!r}")
    return number * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


def _shards(arrays: Mapping[str, Array], limit: int) -> dict[str, dict[str, Array]]:
    """{file: {name: array}}, in their order, filled one after the other up to `limit` bytes."""
    parts: list[dict[str, Array]] = [{}]
    room = limit
    for name, array in arrays.items():
        if parts[-1] and array.nbytes > room:
            parts.append({})
            room = limit
        parts[-1][name] = array
        room -= array.nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    n = len(parts)
    return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _index(shards: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    total = sum(array.nbytes for part in shards.values() for array in part.values())
    weight_map = {name: file for file, part in shards.items() for name in part}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _text(value: Any, **options: Any) -> Callable[[Path], object]:
    text = json.dumps(value, indent=2, **options) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _replace(folder: Path, contents: Mapping[str, Callable[[Path], object]]) -> None:
    """Write all under other names first, so that a full disk leaves the folder as it was."""
    unfinished = {name: folder / f"{name}.unfinished" for name in contents}
    try:
        for name, path in unfinished.items():
            contents[name](path)
        for path in folder.iterdir():  # old checksums, and weights that are in other files now
            old = path.name in (storage.SUMS, WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)
            if old and path.name not in contents:
                path.unlink()
        for name, path in unfinished.items():
            os.replace(path, folder / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


# --- reading --------------------------------------------------------------------------------------


def check_folder(folder: str | Path) -> None:
    """Compare the model's files with the checksums beside them, where there are any.

    Those of training, which lie there too in a checkpoint, are not looked at: a model can write
    without them. Raises ValueError where a file is missing or not as it was saved.
    """
    storage.check_sums(folder, is_models)


def is_models(name: str) -> bool:
    """Whether a file belongs to the model, its tokenizer included."""
    start = (CONFIG, WEIGHTS, "model-", "tokenizer", "vocab", "merges", "special_tokens")
    return name.startswith(start)


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    """Raise ValueError where a tokenizer of so many tokens is not for a model of that vocab_size.

    A model may know more ids than the tokenizer gives: some are padded to a round number.
    """
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model's vocab_size is {vocab_size}: it is "
            "the tokenizer of another model"
        )


def read_config(folder: str | Path, make: Callable[[dict[str, Any]], _Config]) -> _Config:
    """make(the object in config.json)

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it holds no JSON object, or `make` refused it; the file is named.
    """
    path = Path(folder) / CONFIG
    try:
        with _as_damage(path):
            return make(_read_object(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


class Weights:
    """The arrays of a model folder by name; the names and shapes are read at once.

    They are in model.safetensors, or in the shards that its index names. `weights[name]` reads one,
    into memory of its own. A file's header is checked against its length, so the shapes promise no
    more than there is.

    Raises:
        FileNotFoundError: there is neither model.safetensors nor an index, or a shard is missing.
        ValueError: a file is damaged, or the index does not fit the shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / WEIGHTS  # what errors name
        self._files: dict[str, Any] = {}  # name of a tensor: the open file that holds it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        if self.path.exists():
            self._open(self.path)
        elif self.path.with_name(INDEX).exists():
            self.path = self.path.with_name(INDEX)
            self._open_shards()
        else:
            pickled = (self.path.parent / "pytorch_model.bin").exists()
            hint = " (pytorch_model.bin is a pickle and is not opened)" if pickled else ""
            raise FileNotFoundError(f"{folder} is not a model folder: it has no {WEIGHTS}{hint}")

    def _open_shards(self) -> None:
        with _as_damage(self.path):
            weight_map = _read_weight_map(self.path)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not self.path.with_name(shard).is_file():
                raise FileNotFoundError(
                    f"{self.path} names the file {shard}, which is missing beside it"
                )
        for shard in shards:
            listed = {name for name, file in weight_map.items() if file == shard}
            found = self._open(self.path.with_name(shard))
            if lost := sorted(listed - found):
                raise self.damaged(f"it says that {lost[0]} is in {shard}, where it is not")
            if extra := sorted(found - listed):
                raise self.damaged(f"{shard} holds {extra[0]}, of which it says otherwise")

    def _open(self, path: Path) -> set[str]:
        """The names of the tensors in one file, whose shapes and place are kept."""
        from safetensors import safe_open

        with _as_damage(path):
            file = safe_open(path, framework="np")
            names = set(file.keys())
            for name in names:
                header = file.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = _dtype(name, header.get_dtype())
                self._files[name] = file
        return names

    def __getitem__(self, name: str) -> np.ndarray:
        with _as_damage(self.path):
            # A copy: what the library gives may be a view of the file, which others can rewrite.
            return np.array(self._files[name].get_tensor(name), order="C", copy=True)

    def damaged(self, why: object) -> Damaged:
        """The error to raise where the file is not what it should be."""
        return _damaged(self.path, why)


def _dtype(name: str, code: str) -> np.dtype:
    if code not in _DTYPES:
        raise ValueError(f"{name[:80]} has the dtype {code}, expected one of {', '.join(_DTYPES)}")
    return backend.as_dtype(_DTYPES[code])


# What safetensors calls them in a header.
_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    "BF16": "bfloat16",
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    **{f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)},
    "BOOL": "bool",
}


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map, an object of tensor names and files")
    for name, file in weight_map.items():
        # A name and no path: an index from somewhere must not open files elsewhere.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            shown = json.dumps(file)[:80]
            raise ValueError(
                f"{name[:80]} is said to be in {shown}, no .safetensors file beside it"
            )
    return weight_map


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    """Within: whatever is wrong with the file is a sentence that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> Damaged:
    why = getattr(why, "strerror", None) or why  # an OSError's own text has no end
    return Damaged(f"{path} cannot be used: {why}")
