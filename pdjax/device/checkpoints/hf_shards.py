"""Which file of a Hugging Face directory holds which tensor.

As in transformers 5.24: the file that `config.json` names as `transformers_weights`, else
`model.safetensors`, else the shards of `model.safetensors.index.json`. Where transformers takes a
tensor from the last shard that holds one of its name, the file counts that the index names: a shard
left over from an earlier save must not win.
"""

from pathlib import Path, PurePosixPath

from pdjax.core.messages import shown
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.safetensors_file import MAX_NAME, SafetensorsFile
from pdjax.formats.json_file import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
EXPLICIT = "transformers_weights"

_OTHERS = {
    "model*.safetensors.index.json": "a variant; rename it and its shards to the plain names",
    "model*.safetensors": "a variant or a shard without its index; rename it to the plain name",
    "consolidated*.safetensors": "Mistral's own format; convert it with transformers",
    "consolidated*.pth": "Meta's own format; convert it with transformers",
    "pytorch_model*.bin*": "PyTorch's format; save it again with transformers as safetensors",
    "adapter_model*": "an adapter; merge it into its model and save that",
    "*.gguf": "a GGUF file; name the file itself as the model",
    "*.safetensors": f"no name that says it is the model; rename it to {SINGLE_FILE}",
    "tf_model*.h5": "TensorFlow's format; save it again with transformers as safetensors",
    "flax_model*.msgpack": "Flax's format; save it again with transformers as safetensors",
}
"""Files that a directory without known weights may hold, and what to do with them."""


def locate_tensors(directory: Path, config: Fields) -> dict[str, SafetensorsFile]:
    """The open file that holds each tensor, by the name that the file gives it.

    Raises:
      ValueError: there are no weights of a kind that is read, an index is malformed, names a file
        outside the directory or one that is not there, or contradicts the files.
    """
    path = _weights(directory, config)
    if not path.name.endswith(INDEX_SUFFIX):
        file = SafetensorsFile(path)
        return dict.fromkeys(file.tensors, file)
    index = _read_index(path)
    files = {name: _open_shard(path, name) for name in sorted(set(index.values()))}
    located = {}
    for tensor, name in index.items():
        if tensor not in files[name].tensors:
            raise ValueError(
                f"{path}: weight_map says that {shown(tensor)} is in {name}, which does not hold it"
            )
        located[tensor] = files[name]
    # An index may leave a tensor out; then exactly one shard must hold it.
    for name, file in files.items():
        for tensor in file.tensors:
            if tensor in index:
                continue
            if tensor in located:
                raise ValueError(
                    f"{path}: weight_map does not name {tensor}, which {name} holds and "
                    f"{located[tensor].path.name} too"
                )
            located[tensor] = file
    return located


def _weights(directory: Path, config: Fields) -> Path:
    explicit = config.get(EXPLICIT)
    if explicit is not None:
        suffixes = (".safetensors", INDEX_SUFFIX)
        if not isinstance(explicit, str) or not explicit.endswith(suffixes):
            raise config.refuse(EXPLICIT, "the name of a file *.safetensors or of an index of some")
        return _inside(directory, explicit, f"{config.where} {EXPLICIT}")
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    for pattern, what in _OTHERS.items():
        found = min(directory.glob(pattern), default=None)
        if found is not None:
            raise ValueError(
                f"model={str(directory)!r}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
                f"{found.name} is {what}"
            )
    raise ValueError(f"model={str(directory)!r}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(
            f"{path}: weight_map={shown(weight_map)}; allowed: tensor names to file names"
        )
    return weight_map


def _open_shard(index: Path, name: str) -> SafetensorsFile:
    return SafetensorsFile(_inside(index.parent, name, f"{index}: weight_map"))


def _inside(directory: Path, name: str, where: str) -> Path:
    """Path of the file `name` in `directory` or in a folder of it."""
    pure = PurePosixPath(name)
    plain = len(name) <= MAX_NAME and name.isprintable() and "\\" not in name
    if not plain or not pure.parts or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{where}: {shown(name)}; allowed: a file inside the directory")
    return directory / pure
