"""Open a Core ML package: the folder, its manifest, and what each of its functions takes and returns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvlm_convert.mil_check.program import DYNAMIC, ImageLayout, Program, StoredValue, ValueInfo, read_program
from fastvlm_convert.quiet import quiet
from fastvlm_mlx.errors import BundleError, MissingDependencyError
from fastvlm_mlx.vision.coreml_runtime import ONLY_FUNCTION


@dataclass(frozen=True, slots=True)
class FeatureInfo:
    """What a function takes or returns.

    Attributes:
        kind: "image" where Core ML takes a picture; `shape` and `dtype` are those of the tensor made of it.
        shape: in the program, (1, 3, H, W) for an image; -1 where the size isn't fixed.
        dtype: MIL's name, mostly "fp16" or "fp32".
    """

    name: str
    kind: Literal["image", "tensor"]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """A function's interface."""

    name: str
    inputs: tuple[FeatureInfo, ...]
    outputs: tuple[FeatureInfo, ...]


@dataclass(frozen=True, slots=True)
class Package:
    """An open package; the weights stay in their file until a program is executed.

    Attributes:
        path: the .mlpackage folder.
        functions: name -> interface, in the package's order.
        default_function: the one that runs when none is asked for.
        specification_version: 9 for iOS 18 and macOS 15, one less for each year before.
        programs: name -> the function's ops.
    """

    path: Path
    functions: dict[str, FunctionInfo]
    default_function: str
    specification_version: int
    programs: dict[str, Program]

    def program(self, function: str | None = None) -> Program:
        """One function's ops and constants.

        Args:
            function: its name; None for the default.

        Raises:
            BundleError: there is no such function; the message names those there.
        """
        name = self.default_function if function is None else function
        if name not in self.programs:
            raise BundleError(f"{self.path} has no function {name!r}; it has {', '.join(self.programs)}")
        return self.programs[name]


def open_package(path: Path) -> Package:
    """Read a saved package and see whether its weights are all there.

    Args:
        path: an .mlpackage folder with an ML program, of one function or several.

    Raises:
        BundleError: it's no package, has no ML program, or a file in it is damaged, missing or truncated.
        MissingDependencyError: coremltools isn't installed; the format's protobuf classes come from it.
    """
    model = _model_file(path)
    specification = _specification(model)
    if specification.WhichOneof("Type") != "mlProgram":
        kind = specification.WhichOneof("Type") or "no model at all"
        raise BundleError(f"{path} holds no ML program but {kind}; convert the checkpoint again")
    default, descriptions = _descriptions(specification)
    functions = specification.mlProgram.functions
    if missing := [name for name in (*descriptions, default) if name not in functions]:
        raise BundleError(f"{model} is damaged: it lacks function {missing[0]}; copy the whole package again")
    programs = {
        name: read_program(name, functions[name], _images(description), model.parent)
        for name, description in descriptions.items()
    }
    for name, program in programs.items():
        _check_description(model, descriptions[name], program)
    _check_weights(programs)
    return Package(
        path=path,
        functions={name: _interface(program) for name, program in programs.items()},
        default_function=default,
        specification_version=int(specification.specificationVersion),
        programs=programs,
    )


def _model_file(path: Path) -> Path:
    """The specification inside a package, from its manifest."""
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        model = path / "Data" / str(entry["path"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        reason = "is missing" if isinstance(exc, FileNotFoundError) else "is unreadable"
        reason = "is no folder" if isinstance(exc, NotADirectoryError) else f"its Manifest.json {reason}"
        raise BundleError(f"{path} is no Core ML package: {reason}; give an .mlpackage folder") from exc
    if not model.is_file():
        raise BundleError(f"{path} is incomplete: {entry['path']} is missing; copy the whole package again")
    return model


def _specification(model: Path) -> Any:
    """Parse the protobuf."""
    try:
        with quiet():  # its import warns of torch's version and, off macOS, of each native library
            from coremltools.proto import Model_pb2
            from google.protobuf.message import DecodeError
    except ImportError as exc:
        raise MissingDependencyError(
            "reading a Core ML package needs coremltools: pip install 'fastvlm-mlx[convert]'"
        ) from exc
    specification = Model_pb2.Model()
    try:
        specification.ParseFromString(model.read_bytes())
    except DecodeError as exc:
        raise BundleError(f"{model} is damaged ({exc}); copy the whole package again") from exc
    return specification


def _descriptions(specification: Any) -> tuple[str, dict[str, Any]]:
    """The default function, and each function's description (name -> one with `input` and `output`)."""
    description = specification.description
    if description.functions:
        return description.defaultFunctionName, {f.name: f for f in description.functions}
    return ONLY_FUNCTION, {ONLY_FUNCTION: description}


def _images(description: Any) -> dict[str, ImageLayout]:
    layouts = {}
    for feature in description.input:
        if feature.type.WhichOneof("Type") == "imageType":
            image = feature.type.imageType
            layouts[feature.name] = ImageLayout(image.ColorSpace.Name(image.colorSpace))
    return layouts


def _interface(program: Program) -> FunctionInfo:
    inputs = tuple(
        FeatureInfo(i.name, "image" if i.name in program.images else "tensor", i.shape, i.dtype) for i in program.inputs
    )
    outputs = tuple(FeatureInfo(o.name, "tensor", o.shape, o.dtype) for o in program.outputs)
    return FunctionInfo(program.function, inputs, outputs)


def _check_description(model: Path, description: Any, program: Program) -> None:
    """Core ML goes by the description, the checker by the program: they must say the same.

    Raises:
        BundleError: names what differs.
    """
    for features, values in ((description.input, program.inputs), (description.output, program.outputs)):
        found = {value.name: value for value in values}
        for feature in features:
            shape, dtype = _described(feature.type)
            value = found.pop(feature.name, None)
            if value is None or not _agree(shape, dtype, value):
                has = f"{value.dtype} {value.shape}" if value else "nothing of that name"
                raise BundleError(
                    f"{model} is damaged: function {program.function} says of {feature.name} {dtype} {shape}, "
                    f"its program has {has}; convert the checkpoint again"
                )
        if found:
            raise BundleError(
                f"{model} is damaged: function {program.function} doesn't describe {next(iter(found))}; "
                "convert the checkpoint again"
            )


def _agree(shape: tuple[int, ...], dtype: str, value: ValueInfo) -> bool:
    if dtype not in ("", value.dtype) or (shape and len(shape) != len(value.shape)):
        return False
    return all(a == b or DYNAMIC in (a, b) for a, b in zip(shape, value.shape, strict=False))


def _described(kind: Any) -> tuple[tuple[int, ...], str]:
    """Shape and MIL dtype of a feature's description; () and "" where it leaves them open."""
    if kind.WhichOneof("Type") == "imageType":
        image = kind.imageType
        channels = 1 if image.ColorSpace.Name(image.colorSpace).startswith("GRAYSCALE") else 3
        return (1, channels, int(image.height), int(image.width)), ""
    array = kind.multiArrayType
    dtypes = {"FLOAT16": "fp16", "FLOAT32": "fp32", "INT32": "int32"}
    flexible = array.WhichOneof("ShapeFlexibility") is not None
    return () if flexible else tuple(array.shape), dtypes.get(array.ArrayDataType.Name(array.dataType), "")


def _check_weights(programs: dict[str, Program]) -> None:
    """Look up every stored tensor's metadata; functions share most of them, each is looked up once."""
    seen: set[tuple[str, int, str, int]] = set()
    for program in programs.values():
        for op in (*program.constants.values(), *program.operations):
            for value in (v for arguments in op.inputs.values() for v in arguments):
                if isinstance(value, StoredValue) and value.in_file:
                    blob = value.source.blobFileValue
                    key = (blob.fileName, blob.offset, value.dtype, value.count)
                    if key not in seen:
                        value.check()
                        seen.add(key)
