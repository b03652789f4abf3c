"""An order of jobs in which prompts that begin alike follow each other, so that engines reuse what they have.

A tree over blocks of the prompt's bytes grows while lines stream by, as LZ78's dictionary does (Ziv and Lempel 1978): a
job is walked down while its blocks are known and then adds one node, in which it is remembered. All jobs of a group
thus lie in the subtree of the group's first block, however little of the prefix was known when they came; only of a
beginning that groups have in common, a job for each of its blocks comes before they can be told apart. The order is
the tree's depth-first order: with all jobs at hand none reuses more (SGLang, arXiv 2312.07104, theorem 3.1).

It is an order only: a digest that collides, or a block that is forgotten, costs reuse and nothing else. Memory is
bounded by WINDOW_JOBS and MOST_NODES, whatever the file. It knows neither rows nor tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Raw, Struct

from models.states import JobOrder

BLOCK_BYTES = 128  # 32 tokens of English text: what a block of vLLM's cache holds on a CPU, two of it on a GPU
LEAST_BYTES = 4 * BLOCK_BYTES  # of a body that is looked into: what shorter ones share is computed in no time
# Jobs that are ordered among themselves, and blocks that can be found again: 12 bytes a job until they are sorted.
# As many as leave submit well below its 200 MB (`make bench-submit`).
WINDOW_JOBS, MOST_NODES = 500_000, 200_000
RETURNS_SHARE = 0.05  # chosen: with fewer jobs that come back to a group, sorting moves little, so it is left
LENGTHEN_AFTER = 64  # chosen: lines that kept to the common path, until a longer one is tried
MOST_DEPTH = 255
_KEYS = {"/v1/chat/completions": b'"messages"', "/v1/completions": b'"prompt"'}


@dataclass(frozen=True, slots=True)
class OrderedJobs:
    """Jobs of one window of the file, by places in it, in the order to run them.

    `shared[n]`: blocks known to be shared by the n-th in this order and the one before it. The lists of output tokens
    and sizes are by place.
    """

    places: array[int]
    shared: bytearray
    output_tokens: array[int]
    sizes_bytes: array[int]


class _Tools(Struct, gc=False):
    tools: Raw = Raw(b"")
    functions: Raw = Raw(b"")


_decode_tools = msgspec.json.Decoder(_Tools).decode


class PrefixTree:
    """Learns which prompts begin alike, job after job in the file's order; at most WINDOW_JOBS of them."""

    def __init__(self, endpoint: str, *, most_nodes: int = MOST_NODES) -> None:
        self._key = _KEYS.get(endpoint)  # None: embeddings, of which no engine reuses a prefix
        self._most_nodes = most_nodes
        self._known: dict[int, int] = {}  # digest of (parent, block) → node
        self._roots: dict[tuple[str, int], int] = {}
        self._parents = array("i", [0])
        self._nodes, self._outputs, self._sizes = array("i"), array("i"), array("i")
        self._model, self._had_tools = "", False
        self._path, self._path_node, self._path_hits = b"", 0, 0  # where most prompts begin: one look instead of many
        self._root = 0
        self._short_model, self._short_node = "", 0
        self._short_nodes: dict[str, int] = {}  # model → node of its jobs that are not looked into
        self._last = 0
        self._returns = 0
        self._learns = True

    @property
    def nodes_known(self) -> int:
        """Blocks that can be found again now."""
        return len(self._known)

    def add(self, model: str, body: bytes, output_tokens: int) -> None:
        """Remember the next job."""
        self._outputs.append(output_tokens if output_tokens < 0x7FFFFFFF else 0x7FFFFFFF)
        self._sizes.append(len(body))
        if self._key is None or len(body) < LEAST_BYTES:
            self._nodes.append(self._short_node if model == self._short_model else self._turned_short(model))
            return
        has_tools = b'"tools"' in body or b'"functions"' in body
        if has_tools or self._had_tools or model != self._model:
            self._turn_to(model, body)
            self._model, self._had_tools = model, has_tools
        start = body.find(self._key)
        if body.startswith(self._path, start):
            node, at = self._path_node, start + len(self._path)
            self._path_hits += 1
        else:
            self._shorten_path()
            node, at = self._root, start
        known = self._known
        block = body[at : at + BLOCK_BYTES]
        while len(block) == BLOCK_BYTES:
            digest = hash((node, block))
            child = known.get(digest)
            if child is None:
                break
            node = child
            at += BLOCK_BYTES
            block = body[at : at + BLOCK_BYTES]
        else:
            digest = 0
        if self._path_hits > LENGTHEN_AFTER:
            self._path, self._path_node, self._path_hits = body[start:at], node, 0
        last = self._last
        if node != last and node != self._parents[last] and node != self._root:
            self._returns += 1
        if digest and self._learns:
            self._parents.append(node)
            known[digest] = node = len(self._parents) - 1
            if len(known) >= self._most_nodes:
                self._forget()
        self._last = node
        self._nodes.append(node)

    def is_worth_sorting(self) -> bool:
        """Whether the file comes back to groups that it had left often enough to be put in another order."""
        return self._returns > RETURNS_SHARE * len(self._nodes)

    def ordered(self, order: JobOrder = JobOrder.PREFIX) -> OrderedJobs:
        """The jobs in depth-first order; among siblings, and within a node, those with the most output tokens first.

        Long ones first keep the end of a batch short (Graham 1969, longest processing time); with PREFIX_SHORT the
        short ones are first.
        """
        nodes, outputs = self._nodes, self._outputs
        is_long_first = order is JobOrder.PREFIX
        ranks = self._ranks(is_long_first=is_long_first)
        places = sorted(range(len(nodes)), key=outputs.__getitem__, reverse=is_long_first)
        places.sort(key=array("i", (ranks[node] for node in nodes)).__getitem__)
        return OrderedJobs(array("i", places), self._shared(places), outputs, self._sizes)

    def _ranks(self, *, is_long_first: bool) -> array[int]:
        """Each node's place in the depth-first order. A child's number is above its parent's: no stack is needed."""
        parents, count = self._parents, len(self._parents)
        best, sizes = array("i", bytes(4 * count)), array("i", [1]) * count
        for node, tokens in zip(self._nodes, self._outputs, strict=True):
            best[node] = max(best[node], tokens)
        for node in range(count - 1, 0, -1):
            parent = parents[node]
            sizes[parent] += sizes[node]
            best[parent] = max(best[parent], best[node])
        ranks, used = array("i", bytes(4 * count)), array("i", [1]) * count
        for node in sorted(range(1, count), key=best.__getitem__, reverse=is_long_first):
            parent = parents[node]
            ranks[node] = used[parent]
            used[parent] += sizes[node]
        for node in range(1, count):
            ranks[node] += ranks[parents[node]]
        return ranks

    def _shared(self, places: Sequence[int]) -> bytearray:
        """The depth at which each job's path parts from that of the job before it."""
        parents, nodes = self._parents, self._nodes
        depths = bytearray(len(parents))
        for node, parent in enumerate(parents):
            depths[node] = min(depths[parent] + 1, MOST_DEPTH)
        shared, before = bytearray(), 0
        for place in places:
            one, other = before, nodes[place]
            before = other
            while one != other:
                if one > other:
                    one = parents[one]
                else:
                    other = parents[other]
            shared.append(depths[one])
        return shared

    def _turn_to(self, model: str, body: bytes) -> None:
        """The root of this model and these tools, which templates render before the messages."""
        try:
            tools = _decode_tools(body)
        except RecursionError:  # it could just be read at submit, from a shallower stack
            tools = _Tools()
        beginning = (model, hash((bytes(tools.tools), bytes(tools.functions))))
        root = self._roots.get(beginning)
        if root is None:
            root = 0
            if len(self._roots) < self._most_nodes:
                self._parents.append(0)
                self._roots[beginning] = root = len(self._parents) - 1
        if root != self._root:
            self._root = self._path_node = root
            self._path, self._path_hits = b"", 0

    def _turned_short(self, model: str) -> int:
        """The node of this model's short jobs: an engine that serves several loads each of its adapters once."""
        node = self._short_nodes.get(model)
        if node is not None:
            self._returns += 1
        else:
            node = 0
            if self._short_nodes and len(self._short_nodes) < self._most_nodes:  # those of the first model keep the top
                self._parents.append(0)
                node = len(self._parents) - 1
            self._short_nodes[model] = node
        self._short_model, self._short_node = model, node
        return node

    def _shorten_path(self) -> None:
        """Half of it may be what all have in common."""
        blocks = len(self._path) // BLOCK_BYTES // 2
        self._path, self._path_hits = self._path[: blocks * BLOCK_BYTES], 0
        node = self._root
        for at in range(0, len(self._path), BLOCK_BYTES):
            child = self._known.get(hash((node, self._path[at : at + BLOCK_BYTES])))
            if child is None:
                self._path, node = b"", self._root
                break
            node = child
        self._path_node = node

    def _forget(self) -> None:
        """Make room: blocks that came once go, as in lossy counting (Manku and Motwani 2002).

        The jobs that lie in them keep their place below the parent. If nearly all came again, nothing new is learned.
        """
        came_again = set(self._parents)
        self._known = {digest: node for digest, node in self._known.items() if node in came_again}
        self._learns = len(self._known) <= 3 * self._most_nodes // 4
