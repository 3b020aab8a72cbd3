"""Runtime: what is in an ONNX file, read from its bytes before onnxruntime sees them.

Rules:
* our own reader of the protobuf wire format: read-only, bounded in depth, counts and bytes, and stricter than
  protobuf itself: no groups, no overlong numbers, no field twice that may be there once, for two readers that
  understand one file differently are how such checks are passed by;
* nothing is copied and no weight is looked at: payloads are stepped over, long lists of numbers as a whole;
* operators are on a list of what models for tables and signals are made of, or they are refused. Off the list are
  control flow (a `Loop` has been seen to run for ever), chance, images, text, training, and every operator of a
  foreign domain: `com.microsoft` too, for quantised networks need none of it and the import gate takes none of it;
* `Scan` is the exception among control flow, for our converter writes it for nearest neighbours: its length is that
  of its input, so it ends; one inside another is refused, since lengths would multiply;
* data in other files, functions, training steps and sparse tensors are refused, and so is a tensor that claims to be
  larger than the bytes it brings. What a graph *makes* at run time is the probe's business, which limits memory.

Source: onnx.proto3 and the protobuf encoding; the operators are those of ONNX 1.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from lightship_agent.contract.codes import BundleError

_ARITHMETIC: Final = (
    "Abs Add BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Clip CumProd CumSum Det Div Erf Exp Floor Log Max"
    " Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sqrt Sub Sum"
    " Acos Acosh Asin Asinh Atan Atanh Cos Cosh Sin Sinh Tan Tanh"
)
_COMPARISON: Final = "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor"
_REDUCTION: Final = (
    "ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum"
    " ReduceSumSquare TopK"
)
_LINEAR: Final = "Einsum Gemm MatMul"
_SHAPE: Final = (
    "Cast CastLike Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements"
    " GatherND Identity NonZero OneHot Pad Range Reshape ReverseSequence Scatter ScatterElements ScatterND Shape Size"
    " Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unique Unsqueeze"
    " ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceInsert SequenceLength SplitToSequence"
)
_NETWORK: Final = (
    "Attention AveragePool BatchNormalization Celu Conv ConvTranspose Dropout Elu GRU Gelu GlobalAveragePool"
    " GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization LRN LSTM"
    " LayerNormalization LeakyRelu LogSoftmax LpNormalization LpPool MaxPool MeanVarianceNormalization Mish PRelu"
    " RMSNormalization RNN Relu Resize Selu Shrink Sigmoid Softmax Softplus Softsign Swish ThresholdedRelu Upsample"
)
_SIGNAL: Final = "BlackmanWindow DFT HammingWindow HannWindow MelWeightMatrix STFT"
_QUANTISED: Final = (
    "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear"
)
_CLASSICAL: Final = (
    "ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer LabelEncoder"
    " LinearClassifier LinearRegressor Normalizer OneHotEncoder SVMClassifier SVMRegressor Scaler TreeEnsemble"
    " TreeEnsembleClassifier TreeEnsembleRegressor ZipMap"
)
_FAMILIES: Final = (
    _ARITHMETIC, _COMPARISON, _REDUCTION, _LINEAR, _SHAPE, _NETWORK, _SIGNAL, _QUANTISED, "Scan",
)  # fmt: skip
ML_DOMAIN: Final = "ai.onnx.ml"
#: The operators a device runs, by domain.
OPERATORS: Final[dict[str, frozenset[str]]] = {
    "": frozenset(" ".join(_FAMILIES).split()),
    ML_DOMAIN: frozenset(_CLASSICAL.split()),
}
#: Control flow, said apart from other operators: it may run for ever, or branch on data.
UNBOUNDED: Final = frozenset({"If", "Loop", "SequenceMap"})
_SCAN: Final = "Scan"
#: The name that the standard also has for its own domain.
_DEFAULT_DOMAIN: Final = "ai.onnx"

MAX_DEPTH: Final = 4  # graphs within graphs
MAX_NODES: Final = 50_000
MAX_TENSORS: Final = 100_000
MAX_FIELDS: Final = 1_000_000  # that are looked at one by one: a second or so
_MAX_NAME: Final = 256  # bytes of an operator's or attribute's name, or a domain

#: The wire types of protobuf, and what a record of each is.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: Bits of one element by TensorProto.DataType; text (8) is counted by its bytes.
_TEXT: Final = 8
_BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 8: 0, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
#: TensorProto's typed payloads by field: bytes of one element when packed, or 1 where that varies.
_TYPED: Final = {4: 4, 5: 1, 7: 1, 10: 8, 11: 1}
_COMPLEX: Final = frozenset({14, 15})  # two numbers an element
#: Attributes of trees that count or point: no node, tree, feature or class is numbered below zero.
_POINTERS: Final = frozenset(
    f"{whose}_{what}".encode()
    for whose, parts in {
        "nodes": "featureids treeids nodeids truenodeids falsenodeids trueleafs falseleafs modes",
        "class": "ids treeids nodeids",
        "target": "ids treeids nodeids",
        "leaf": "targetids",
        "tree": "roots",
    }.items()
    for what in parts.split()
)
_STREAK: Final = 12  # records of one kind after which the rest is stepped over as a whole
_WINDOW: Final = 1 << 10  # bytes looked at once, at first,
_WINDOW_MAX: Final = 1 << 15  # and in the end: what a small processor's cache holds
_SLACK: Final = 64  # bytes: no listed record that is stepped over is longer
_LONGEST: Final = 10  # bytes of a number: those of a negative one, and of unsigned ones from 2⁶³ on


class Operator(msgspec.Struct, frozen=True, order=True):
    """An operator, and how many nodes use it."""

    domain: str
    name: str
    nodes: int


class GraphFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a model file; sub-graphs and functions count in."""

    ir_version: int
    opsets: dict[str, int]  # version by domain
    operators: tuple[Operator, ...]  # sorted
    tensors: int
    tensor_bytes: int  # what they say they are, in memory
    depth: int  # 1 for a plain graph
    functions: int = 0
    nested_scans: int = 0

    @property
    def nodes(self) -> int:
        """All nodes."""
        return sum(o.nodes for o in self.operators)


def check_graph(data: bytes, *, max_bytes: int) -> GraphFacts:
    """Refuse a model that no device shall load.

    Args:
        data: the serialised `ModelProto`.
        max_bytes: that its tensors may take in memory.

    Raises:
        BundleError: bundle.graph.
    """
    facts = read_graph(data, max_bytes=max_bytes)
    foreign = sorted({o.domain for o in facts.operators} | set(facts.opsets) - {""})
    foreign = [domain for domain in foreign if domain not in OPERATORS]
    if foreign:
        raise _refused("Operators of a foreign domain", ", ".join(d[:60] for d in foreign[:5]))
    loops = [o.name for o in facts.operators if not o.domain and o.name in UNBOUNDED]
    if loops:
        raise _refused("Operators that may run for ever, or branch on data", ", ".join(loops))
    others = [o.name for o in facts.operators if o.name not in OPERATORS[o.domain]]
    if others:
        raise _refused("Operators that no device runs", ", ".join(name[:60] for name in others[:5]))
    if facts.functions:
        raise _refused(_UNKNOWN, f"the model defines {facts.functions} functions of its own")
    if facts.nested_scans:
        raise _refused("A Scan inside a Scan", "their lengths would multiply")
    return facts


def read_graph(data: bytes, *, max_bytes: int) -> GraphFacts:
    """What is in a model, whether or not a device may load it.

    Args:
        data: the serialised `ModelProto`.
        max_bytes: that its tensors may take in memory.

    Raises:
        BundleError: bundle.graph when it is not one whole, self-contained model within bounds.
    """
    return _Walk(data, max_bytes).model()


def _refused(what: str, detail: str) -> BundleError:
    remedy = "Export the model anew: one file, standard operators, no loops."
    return BundleError("bundle.graph", f"{what}: {detail}.", remedy=remedy)


_MALFORMED: Final = "Not an ONNX file"
_CUT: Final = "An ONNX file that is cut off"
_LARGE: Final = "Beyond what a device loads"
_ELSEWHERE: Final = "Not one whole file"
_UNKNOWN: Final = "Not a plain model"


class _Field(msgspec.Struct, frozen=True):
    """One record: its number and wire type, where its payload is, and the number it holds if it is one."""

    number: int
    wire: int
    start: int
    end: int
    value: int = 0


class _Walk:
    """One pass over the bytes of a model, and what was met on the way."""

    def __init__(self, data: bytes, max_bytes: int) -> None:
        self._data = data
        self._array = np.frombuffer(data, dtype=np.uint8)
        self._max_bytes = max_bytes
        self._fields_left = MAX_FIELDS
        self._operators: dict[tuple[str, str], int] = {}
        self._opsets: dict[str, int] = {}
        self._tensors = self._tensor_bytes = self._nodes = self._deepest = 0
        self._functions = self._nested_scans = 0

    # The messages of onnx.proto ---------------------------------------------------------------------------------------

    def model(self) -> GraphFacts:
        """ModelProto."""
        graph: _Field | None = None
        ir_version = 0
        for f in self._once(0, len(self._data), frozenset({1, 7})):
            match f.number:
                case 1:
                    ir_version = self._number(f)
                case 7:
                    graph = self._message(f)
                case 8:
                    self._opset(self._message(f))
                case 20:
                    raise _refused(_UNKNOWN, "the model brings training steps")
                case 25:
                    self._function(self._message(f))
        if graph is None or not self._opsets:
            raise _refused(_MALFORMED, "expected a model with a graph and its opsets, found none")
        self._graph(graph, 1, within_scan=False)
        if not self._nodes:
            raise _refused(_MALFORMED, "expected a graph with operators, found none")
        return GraphFacts(
            ir_version=ir_version,
            opsets=self._opsets,
            operators=tuple(sorted(Operator(d, n, count) for (d, n), count in self._operators.items())),
            tensors=self._tensors,
            tensor_bytes=self._tensor_bytes,
            depth=self._deepest,
            functions=self._functions,
            nested_scans=self._nested_scans,
        )

    def _opset(self, at: _Field) -> None:
        """OperatorSetIdProto."""
        domain, version = "", 0
        for f in self._once(at.start, at.end, frozenset({1, 2})):
            if f.number == 1:
                domain = self._domain(f)
            elif f.number == 2:
                version = self._number(f)
        if self._opsets.get(domain, version) != version:
            raise _refused(_MALFORMED, f"two different opsets of the domain {domain!r}")
        self._opsets[domain] = version

    def _function(self, at: _Field) -> None:
        """FunctionProto: its nodes count, for whoever only wants to know."""
        self._functions += 1
        for f in self._fields(at.start, at.end):
            if f.number == 7:
                self._node(self._message(f), 1, within_scan=False)

    def _graph(self, at: _Field, depth: int, *, within_scan: bool) -> None:
        """GraphProto."""
        if depth > MAX_DEPTH:
            raise _refused(_LARGE, f"graphs within graphs, more than {MAX_DEPTH} deep")
        self._deepest = max(self._deepest, depth)
        for f in self._fields(at.start, at.end):
            match f.number:
                case 1:
                    self._node(self._message(f), depth, within_scan=within_scan)
                case 5:
                    self._tensor(self._message(f))
                case 15:
                    raise _refused(_UNKNOWN, "the graph has sparse tensors")

    def _node(self, at: _Field, depth: int, *, within_scan: bool) -> None:
        """NodeProto."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _refused(_LARGE, f"more than {MAX_NODES} operators")
        name = domain = ""
        attributes = []
        for f in self._once(at.start, at.end, frozenset({4, 7})):
            match f.number:
                case 4:
                    name = self._text(f)
                case 5:
                    attributes.append(self._message(f))
                case 7:
                    domain = self._domain(f)
        self._operators[domain, name] = self._operators.get((domain, name), 0) + 1
        is_scan = name == _SCAN
        self._nested_scans += is_scan and within_scan
        for attribute in attributes:
            self._attribute(attribute, depth, within_scan=within_scan or is_scan)

    def _attribute(self, at: _Field, depth: int, *, within_scan: bool) -> None:
        """AttributeProto: whatever its type is said to be, everything in it is looked at."""
        name, negative = b"", False
        for f in self._once(at.start, at.end, frozenset({1, 3, 5, 6}), listed=True):
            match f.number:
                case 1:
                    name = self._bytes(f, _MAX_NAME)
                case 5 | 10:
                    self._tensor(self._message(f))
                case 6 | 11:
                    self._graph(self._message(f), depth + 1, within_scan=within_scan)
                case 8:
                    negative = self._holds_negative(f) or negative
                case 22 | 23:
                    raise _refused(_UNKNOWN, "an attribute has sparse tensors")
        if negative and name in _POINTERS:
            raise _refused("A tree that points nowhere", f"a negative number among its {name.decode()}")

    def _holds_negative(self, f: _Field) -> bool:
        """Whether there is a negative number in one record, which may hold several."""
        if f.wire != _BYTES:
            return self._number(f) >> 63 > 0
        ends = np.flatnonzero(self._array[f.start : f.end] < 0x80)
        return bool((np.diff(ends, prepend=-1) >= _LONGEST).any())

    def _tensor(self, at: _Field) -> None:
        """TensorProto: what it claims to be must be there."""
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise _refused(_LARGE, f"more than {MAX_TENSORS} tensors")
        kind, elements, held, texts, raw = 0, 1, 0, 0, -1
        for f in self._once(at.start, at.end, frozenset({2, 9, 14})):
            match f.number:
                case 1:
                    elements = self._times_dims(elements, f)
                case 2:
                    kind = self._number(f)
                case 3 | 13:
                    raise _refused(_ELSEWHERE, "a tensor keeps its data in another file, or in pieces")
                case 14 if self._number(f):
                    raise _refused(_ELSEWHERE, "a tensor keeps its data in another file")
                case 6:
                    held, texts = held + 1, texts + f.end - f.start
                case 9:
                    raw = self._message(f).end - f.start
                case 4 | 5 | 7 | 10 | 11:
                    held += (f.end - f.start) // _TYPED[f.number] if f.wire == _BYTES else 1
        if kind not in _BITS:
            raise _refused(_MALFORMED, f"a tensor is of the unknown type {kind}")
        self._weigh(kind, elements, held, texts, raw)

    def _weigh(self, kind: int, elements: int, held: int, texts: int, raw: int) -> None:
        """Compare what a tensor claims with what it brings.

        Args:
            kind: its TensorProto.DataType.
            elements: what its shape multiplies to.
            held: at most how many numbers or texts its typed payload has.
            texts: bytes of its texts.
            raw: bytes of its raw payload; -1 when there is none.
        """
        claimed = texts if kind == _TEXT else (elements * _BITS[kind] + 7) // 8
        numbers = elements * (2 if kind in _COMPLEX else 1)
        if raw < 0 and _BITS[kind] in (2, 4):  # several to a number
            numbers = claimed
        short = raw != claimed if raw >= 0 and kind != _TEXT else held < numbers
        if short:
            raise _refused(_LARGE, f"a tensor claims {elements} elements ({claimed} bytes) and brings others")
        self._tensor_bytes += claimed
        if self._tensor_bytes > self._max_bytes:
            raise _refused(_LARGE, f"the tensors take more than {self._max_bytes} bytes")

    def _times_dims(self, elements: int, f: _Field) -> int:
        """`elements` times the dimensions in one record, which may hold several."""
        for value in self._packed(f) if f.wire == _BYTES else (self._number(f),):
            if value >> 63:
                raise _refused(_MALFORMED, "a tensor has a negative dimension")
            elements *= value
            if elements >> 63:
                raise _refused(_LARGE, "a tensor claims more elements than there are numbers for")
        return elements

    # The wire format --------------------------------------------------------------------------------------------------

    def _once(self, at: int, end: int, single: frozenset[int], *, listed: bool = False) -> Iterator[_Field]:
        """The records of a message, of which those in `single` may come once."""
        seen = set()
        for f in self._listed(at, end) if listed else self._fields(at, end):
            if f.number in single:
                if f.number in seen:
                    raise _refused(_MALFORMED, f"field {f.number} is there twice, at byte {f.start}")
                seen.add(f.number)
            yield f

    def _fields(self, at: int, end: int) -> Iterator[_Field]:
        """The records of a message."""
        while at < end:
            tag, start = self._varint(at, end)
            field = self._record(tag, start, end)
            yield field
            at = field.end

    def _listed(self, at: int, end: int) -> Iterator[_Field]:
        """The records of an attribute. Trees come as lists of a hundred thousand numbers, each a record of its own: of
        such a list only some records are given, among them a negative number if there is one.
        """
        last, streak = -1, 0
        while at < end:
            tag, start = self._varint(at, end)
            field = self._record(tag, start, end)
            yield field
            at = field.end
            streak = streak + 1 if tag == last else 0
            last = tag
            if streak >= _STREAK and tag in _LISTS:
                streak = 0
                past, negative = self._skip(tag, at, end)
                if negative:
                    yield _Field(field.number, _VARINT, at, past, 1 << 63)
                at = past

    def _record(self, tag: int, start: int, end: int) -> _Field:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise _refused(_LARGE, f"more than {MAX_FIELDS} records")
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _refused(_MALFORMED, f"no field has the number {number}, at byte {start}")
        match wire:
            case 0:
                value, past = self._varint(start, end)
                return _Field(number, wire, start, past, value)
            case 1 | 5:
                past = start + (8 if wire == _FIXED64 else 4)
            case 2:
                length, start = self._varint(start, end)
                past = start + length
            case _:
                raise _refused(_MALFORMED, f"wire type {wire} at byte {start}")
        if past > end:
            raise _refused(_CUT, f"a field ends at byte {past}, what holds it at {end}")
        return _Field(number, wire, start, past)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A number of up to 64 bits, and where it ends."""
        data, value, shift = self._data, 0, 0
        while at < end:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64 or (not byte and shift):
                    raise _refused(_MALFORMED, f"an overlong number ends at byte {at}")
                return value, at
            shift += 7
            if shift > 63:
                raise _refused(_MALFORMED, f"a number has no end at byte {at}")
        raise _refused(_CUT, f"in a number, at byte {at}")

    def _packed(self, f: _Field) -> Iterator[int]:
        at = f.start
        while at < f.end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise _refused(_LARGE, f"more than {MAX_FIELDS} records")
            value, at = self._varint(at, f.end)
            yield value

    def _number(self, f: _Field) -> int:
        if f.wire != _VARINT:
            raise _refused(_MALFORMED, f"field {f.number} is no number, at byte {f.start}")
        return f.value

    def _message(self, f: _Field) -> _Field:
        if f.wire != _BYTES:
            raise _refused(_MALFORMED, f"field {f.number} has no content, at byte {f.start}")
        return f

    def _bytes(self, f: _Field, limit: int) -> bytes:
        self._message(f)
        if f.end - f.start > limit:
            raise _refused(_LARGE, f"a name of {f.end - f.start} bytes, at byte {f.start}; expected {limit} at most")
        return self._data[f.start : f.end]

    def _text(self, f: _Field) -> str:
        try:
            return self._bytes(f, _MAX_NAME).decode()
        except UnicodeDecodeError as e:
            raise _refused(_MALFORMED, f"a name is not UTF-8, at byte {f.start}") from e

    def _domain(self, f: _Field) -> str:
        found = self._text(f)
        return "" if found == _DEFAULT_DOMAIN else found

    # Long lists -------------------------------------------------------------------------------------------------------

    def _skip(self, tag: int, at: int, end: int) -> tuple[int, bool]:
        """Step over the records with this `tag` from `at` on.

        Returns:
            Where the first record that is something else begins (or might), and whether a number was negative.
        """
        window, negative = _WINDOW, False
        while at < end:
            piece = self._array[at : min(end, at + window)]
            taken, minus = _LISTS[tag](piece, tag)
            at += taken
            negative = negative or minus
            if len(piece) < window or taken < window - _SLACK:
                break
            window = min(window * 4, _WINDOW_MAX)
        return at, negative


_Bytes = npt.NDArray[np.uint8]


def _floats(piece: _Bytes, tag: int) -> tuple[int, bool]:
    """Records of a tag and four bytes at the start of `piece`: how many bytes they take."""
    whole = len(piece) // 5
    return 5 * _leading(piece[: 5 * whole : 5] == tag), False


def _numbers(piece: _Bytes, tag: int) -> tuple[int, bool]:
    """Records of a tag and a number. Tag and number each end in a byte below 0x80, and have no other."""
    # What is overlong, or begins before `piece` ends and does not end in it, is left to the one who looks closely.
    overlong = np.flatnonzero((piece[1:] == 0) & (piece[:-1] >= 0x80))
    if len(overlong):
        piece = piece[: overlong[0]]
    ends = np.flatnonzero(piece < 0x80)
    if len(ends) < 2 or ends[0]:
        return 0, False
    tags, lasts = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
    fine = piece.take(tags) == tag
    fine[1:] &= tags[1:] - lasts[:-1] == 1
    lengths = lasts - tags
    longest = int(lengths.max())
    if longest >= _LONGEST:
        fine &= (lengths < _LONGEST) | ((lengths == _LONGEST) & (piece.take(lasts) == 1))
    count = _leading(fine)
    negative = longest >= _LONGEST and bool((lengths[:count] == _LONGEST).any())
    return (int(lasts[count - 1]) + 1, negative) if count else (0, False)


def _texts(piece: _Bytes, tag: int) -> tuple[int, bool]:
    """Records of a tag, a length below 32, and as many bytes. Wrong guesses of where one begins only end the list."""
    begins = np.flatnonzero((piece[:-1] == tag) & (piece[1:] < 0x20))
    if not len(begins) or begins[0]:
        return 0, False
    past = begins + 2 + piece[begins + 1]
    count = _leading(past[:-1] == begins[1:])
    return int(begins[count]), False  # what the last one holds is for the caller to see


#: Lists within an attribute by their tag: floats, ints, strings.
_LISTS: Final[dict[int, Callable[[_Bytes, int], tuple[int, bool]]]] = {0x3D: _floats, 0x40: _numbers, 0x4A: _texts}


def _leading(fine: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return len(fine) if fine.all() else int(fine.argmin())
