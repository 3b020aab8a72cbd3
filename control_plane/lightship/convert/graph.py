"""Convert: surgery on an ONNX graph, so that every model a device gets has the same ends.

    features float32 [N, w]  →  label int64 [N] (class index), scores float32 [N, C]
                             or value float32 [N, 1]

Rules:
* pure: a graph in memory is edited, nothing is run;
* names are changed everywhere at once, inner graphs included, and never collide;
* what the outputs do not need is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from lightship_agent.contract.schema import Outputs

from .inspection import ML_DOMAIN, nodes

LABEL: Final = "label"
SCORES: Final = "scores"
VALUE: Final = "value"
_ROWS: Final = "N"


class Editor:
    """Appends operators to a model and settles its ends.

    Args:
        model: the `ModelProto`, edited in place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._taken = set(_names(model.graph))

    def node(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Append an operator; the name of its output."""
        name = self._fresh(op.lower())
        made = helper.make_node(op, list(inputs), [name], name=f"{name}_node", domain=domain, **attributes)
        self.model.graph.node.append(made)
        return name

    def integers(self, values: Sequence[int]) -> str:
        """An int64 constant."""
        name = self._fresh("const")
        self.model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], list(values)))
        return name

    def flat(self, tensor: str) -> str:
        """`[N, 1]` as `[N]`."""
        return self.node("Reshape", [tensor, self.integers([-1])])

    def cast(self, tensor: str, kind: int) -> str:
        """Another element type."""
        return self.node("Cast", [tensor], to=kind)

    def class_index(self, label: str, keys: Sequence[str] | Sequence[int]) -> str:
        """Class names (or numbers), as the graph says them, become their position in `keys`; unknown ones -1."""
        self._need_ml(2)  # LabelEncoder from anything to anything
        kind = "keys_strings" if isinstance(keys[0], str) else "keys_int64s"
        attributes = {kind: list(keys), "values_int64s": list(range(len(keys))), "default_int64": -1}
        return self.node("LabelEncoder", [label], domain=ML_DOMAIN, **attributes)

    def columns(self, scores: str, order: Sequence[int]) -> str:
        """The columns of `[N, C]` in another order, or some of them."""
        return self.node("Gather", [scores, self.integers(order)], axis=1)

    def mirrored(self, scores: str) -> str:
        """A binary decision value `[N, 1]` as `[N, 2]`: (-s, s)."""
        return self.node("Concat", [self.node("Neg", [scores]), scores], axis=1)

    def complemented(self, scores: str) -> str:
        """A probability `[N, 1]` as `[N, 2]`: (1 - p, p)."""
        one = self._fresh("one")
        self.model.graph.initializer.append(helper.make_tensor(one, TensorProto.FLOAT, [1], [1.0]))
        return self.node("Concat", [self.node("Sub", [one, scores]), scores], axis=1)

    def argmax(self, scores: str) -> str:
        """The index of the highest score, int64 `[N]`."""
        return self.node("ArgMax", [scores], axis=1, keepdims=0)

    def drop_zipmaps(self) -> dict[str, tuple[str, tuple[str, ...] | tuple[int, ...]]]:
        """Take out every ZipMap (scores as dictionaries).

        Returns:
            By the name of the output that held dictionaries: the tensor of scores `[N, C]`, and the class names
            of its columns.
        """
        found: dict[str, tuple[str, tuple[str, ...] | tuple[int, ...]]] = {}
        for node in [n for n in self.model.graph.node if n.op_type == "ZipMap"]:
            keys = {a.name: a for a in node.attribute}
            strings, numbers = keys.get("classlabels_strings"), keys.get("classlabels_int64s")
            names = tuple(s.decode() for s in strings.strings) if strings else tuple(numbers.ints) if numbers else ()
            found[node.output[0]] = (node.input[0], names)
            self.model.graph.node.remove(node)
        return found

    def settle(self, input_name: str, width: int, ends: dict[str, str], outputs: Outputs) -> None:
        """Name and type the graph's ends, and leave out what they do not need.

        Args:
            input_name: the final name of the one input.
            width: its columns.
            ends: the final name of each output, and the tensor that is it.
            outputs: what they mean.
        """
        graph = self.model.graph
        entry = _entry(graph)
        firm = {final: self._own(tensor, entry) for final, tensor in ends.items()}
        wanted = {entry: input_name} | {tensor: final for final, tensor in firm.items()}
        # Names that are in somebody else's way make room first.
        crowded = (set(wanted.values()) & self._taken) - set(wanted)
        _rename(graph, wanted | {name: self._fresh(f"{name}_inner") for name in crowded})
        del graph.input[:]
        graph.input.append(helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [_ROWS, width]))
        del graph.output[:]
        shapes: dict[str, tuple[int, list[str | int]]] = {
            LABEL: (TensorProto.INT64, [_ROWS]),
            SCORES: (TensorProto.FLOAT, [_ROWS, len(outputs.labels)]),
            VALUE: (TensorProto.FLOAT, [_ROWS, 1]),
        }
        for final in ends:
            graph.output.append(helper.make_tensor_value_info(final, *shapes[final]))
        del graph.value_info[:]  # converters guess some of them wrongly, and the runtime works them out itself
        _prune(graph)
        self._tidy()

    def _fresh(self, stem: str) -> str:
        name, n = f"ls_{stem}", 2
        while name in self._taken:
            name, n = f"ls_{stem}_{n}", n + 1
        self._taken.add(name)
        return name

    def _own(self, tensor: str, entry: str) -> str:
        """`tensor`, or a copy where it is the graph's input or a constant, which can't be an output."""
        constant = {t.name for t in self.model.graph.initializer}
        return self.node("Identity", [tensor]) if tensor == entry or tensor in constant else tensor

    def _need_ml(self, version: int) -> None:
        for opset in self.model.opset_import:
            if opset.domain == ML_DOMAIN:
                opset.version = max(opset.version, version)
                return
        self.model.opset_import.append(helper.make_opsetid(ML_DOMAIN, version))

    def _tidy(self) -> None:
        """One opset entry per domain, and nothing that changes from run to run."""
        opsets: dict[str, int] = {}
        for opset in self.model.opset_import:
            domain = "" if opset.domain == "ai.onnx" else opset.domain
            opsets[domain] = max(opsets.get(domain, 0), opset.version)
        used = {"", *(n.domain for n in nodes(self.model.graph))}
        del self.model.opset_import[:]
        for domain in sorted(set(opsets) & used):
            self.model.opset_import.append(helper.make_opsetid(domain, opsets[domain]))
        self.model.graph.name = "lightship"


def class_names(model: Any, classes: int | None = None) -> tuple[str, ...] | tuple[int, ...]:
    """The class names that the graph itself knows, in the order of its scores; empty when it has none.

    They stand in the attributes of classifier operators and ZipMap, or in a constant called after classes.

    Args:
        model: the `ModelProto`.
        classes: how many there must be; None for any.
    """
    for node in nodes(model.graph):
        for attribute in node.attribute:
            if attribute.name.startswith("classlabels"):
                found = tuple(s.decode() for s in attribute.strings) or tuple(attribute.ints)
                if found and classes in (None, len(found)):
                    return found
    for tensor in model.graph.initializer:
        if "classes" in tensor.name and "ind" not in tensor.name:
            values = onnx.numpy_helper.to_array(tensor).ravel().tolist()
            if len(values) > 1 and classes in (None, len(values)):
                texts = tuple(v.decode() if isinstance(v, bytes) else v for v in values)
                if all(isinstance(v, (str, int)) for v in texts):
                    return texts
    return ()


def _entry(graph: Any) -> str:
    constant = {t.name for t in graph.initializer}
    return str(next(v.name for v in graph.input if v.name not in constant))


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _names(graph: Any) -> Iterator[str]:
    for one in _graphs(graph):
        yield from (v.name for v in (*one.input, *one.output, *one.initializer))
        for node in one.node:
            yield from (*node.input, *node.output)


def _rename(graph: Any, mapping: dict[str, str]) -> None:
    for one in _graphs(graph):
        for value in (*one.input, *one.output, *one.initializer, *one.value_info):
            value.name = mapping.get(value.name, value.name)
        for node in one.node:
            node.input[:] = [mapping.get(n, n) for n in node.input]
            node.output[:] = [mapping.get(n, n) for n in node.output]


def _prune(graph: Any) -> None:
    """Keep the operators and constants that the outputs depend on."""
    needed = {v.name for v in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                needed.update(_names(inner))
    constants = [t for t in graph.initializer if t.name in needed]
    kept.reverse()
    for field, values in ((graph.node, kept), (graph.initializer, constants)):
        copies = [type(v).FromString(v.SerializeToString()) for v in values]
        del field[:]
        field.extend(copies)
