"""The messages between the handler and an engine process, and how they are framed.

Both ends hold one end of a local stream socket. A frame is a 4-byte little-endian length and that
many bytes of MessagePack; every message is a tagged `msgspec.Struct`. One `StepOutput` frame carries
everything that one engine step produced. The first frame tells the engine's process what it is to serve.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from runtime.catalogue import ModelSpec
from runtime.errors import FirstlightError

if TYPE_CHECKING:
    import io
    import socket

FinishReason = Literal["stop", "length", "abort", "error", "refused"]
Phase = Literal["download", "convert", "load", "warmup"]
SleepLevel = Literal[1, 2]

# What a sequence's place on a GPU has room for: tokens with a bias, and stop tokens beside a minimum length.
MAX_BIASES = 1024
MAX_STOPS = 256

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine process needs to know before its first request. Lengths are in tokens.

    With several ranks, a step that takes longer than `stuck_after_s` seconds is taken for one that hangs.
    """

    model: ModelSpec
    cache_dir: str
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    stuck_after_s: float = 300.0

    @classmethod
    def of(cls, model: ModelSpec, cache_dir: str, **given: Any) -> EngineConfig:
        """The settings for one model: what is given beats what its catalogue entry says.

        Raises `TypeError` for a setting that does not exist or has a value of the wrong type, and
        `FirstlightError` for an entry with adapters.
        """
        if model.adapters:
            names = ", ".join(model.adapters)
            raise FirstlightError(f"{model.id}: adapters ({names}) are not supported yet; remove them.")
        own = {
            "dtype": model.dtype,
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,
            "world_size": model.tp_size,
        }
        config = cls(model=model, cache_dir=cache_dir, **{**own, **given})
        try:
            return msgspec.convert(msgspec.to_builtins(config), cls)
        except msgspec.ValidationError as error:
            raise TypeError(f"engine settings: {error}") from None


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like, in llguidance's own terms: see `runtime.text.grammar`.

    `field` names the part of the request that asked for it, for messages about it.
    """

    source: str
    field: str


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How one sequence is sampled. Ranges are checked by the handler before they get here.

    `temperature` 0 is greedy; `top_k` 0 is off. `stop_token_ids` holds every id that ends the
    sequence, the model's own end-of-sequence ids included unless the request ignores them.
    `logprobs` None is off, 0 is the chosen token only, n adds the n most likely. With a `grammar` only
    tokens come that it allows, and tokens that end the sequence only where it may end. `allowed_token_ids`
    are the only ones that come at all, unless there are none; each of `bad_words`, two or more tokens, never
    comes in the answer as a whole.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def masked(self) -> bool:
        """Whether each token is drawn from what a mask leaves."""
        return self.grammar is not None or bool(self.allowed_token_ids or self.bad_words)


# ---- handler -> engine -------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit", omit_defaults=True, kw_only=True):
    """One sequence to generate. `cache_salt` keeps one tenant's prefix blocks from another's.

    Of those that wait, the ones with the lowest `priority` are taken up first.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    priority: int = 0


class Abort(msgspec.Struct, tag="abort"):
    """Forget these requests and free their blocks; no further output is sent for them."""

    request_ids: list[str]


class Sleep(msgspec.Struct, tag="sleep", omit_defaults=True):
    """Once nothing runs any more, give back the device's memory; answered by `Asleep`.

    The weights wait in pinned host memory at level 1, in their files at level 2. Requests that come
    meanwhile wait, and wake the engine again. With `when_idle` they are served instead, and the engine
    stays awake; then there is no answer.
    """

    level: SleepLevel
    when_idle: bool = False


class Wake(msgspec.Struct, tag="wake"):
    """Take the memory back and the weights in again; answered by `Awake`. A request does the same."""


class Drain(msgspec.Struct, tag="drain"):
    """Finish what has been submitted, then exit with status 0."""


Command = Submit | Abort | Sleep | Wake | Drain


# ---- engine -> handler -------------------------------------------------------------------------


class Progress(msgspec.Struct, tag="progress", omit_defaults=True, kw_only=True):
    """How far a start has come. `directory` is set once config and tokenizer files are in it."""

    phase: Phase
    bytes_done: int = 0
    bytes_total: int = 0
    directory: str | None = None


class Ready(msgspec.Struct, tag="ready", kw_only=True):
    """The engine takes requests. `marks` are seconds since the handler process was executed.

    With `unverified` it computes with bytes of a download whose digests are not known yet: no answer may
    end before the mark `verified` follows. If they are wrong, `Broken` follows instead.
    """

    device: str
    dtype: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    weight_bytes: int
    marks: dict[str, float]
    counters: dict[str, int]
    unverified: bool = False


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Natural-log probabilities at one position: the token's own, its rank from 1, and the best."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class TokenDelta(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What one step added to one sequence.

    `stop_token_id` is the id that ended a sequence whose `finish_reason` is "stop"; that id is not
    in `token_ids`. `prompt_logprobs` comes once, with the first delta, and starts with None because
    nothing predicts the first token. `prefill_seconds`, with the first delta too, is the time from when the
    sequence was first taken up. "refused" is a request that cannot be served as it is written, "error"
    a failure of ours; `error` says why, and `param` which field is at fault.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] = []
    num_cached_tokens: int = 0
    prefill_seconds: float = 0.0
    error: str | None = None
    param: str | None = None


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's counters after a step; totals count since the engine started."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0


class StepOutput(msgspec.Struct, tag="step", kw_only=True):
    """Everything one engine step produced."""

    deltas: list[TokenDelta]
    stats: EngineStats


class Mark(msgspec.Struct, tag="mark"):
    """A start mark that was reached after `Ready`, e.g. `first_token` or `verified`."""

    name: str
    seconds: float


class Asleep(msgspec.Struct, tag="asleep"):
    """The device's memory has been given back."""

    level: SleepLevel


class Awake(msgspec.Struct, tag="awake"):
    """The engine computes again. `seconds` is how long that took; 0 for one that was not asleep."""

    seconds: float


class Fatal(msgspec.Struct, tag="fatal"):
    """The engine cannot start, for a reason that starting again will not mend."""

    message: str


class Broken(msgspec.Struct, tag="broken"):
    """The engine is about to end, for a reason that starting again may mend."""

    message: str


Event = Progress | Ready | StepOutput | Mark | Asleep | Awake | Fatal | Broken

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_commands_decoder: msgspec.msgpack.Decoder[list[Command]] = msgspec.msgpack.Decoder(list[Command])
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def frame(body: bytes) -> bytes:
    """A body as the bytes that go on the socket."""
    return _LENGTH.pack(len(body)) + body


def encode_frame(message: Command | Event) -> bytes:
    """One message as the bytes that go on the socket."""
    return frame(_encoder.encode(message))


def encode_commands(commands: list[Command]) -> bytes:
    """Commands as one rank passes them on to another."""
    return _encoder.encode(commands)


def decode_commands(body: bytes) -> list[Command]:
    """The commands that were passed on."""
    return _commands_decoder.decode(body)


def decode_command(body: bytes | memoryview) -> Command:
    """The message in a frame's body, as the engine reads it."""
    return _command_decoder.decode(body)


def decode_event(body: bytes | memoryview) -> Event:
    """The message in a frame's body, as the handler reads it."""
    return _event_decoder.decode(body)


def encode_config(config: EngineConfig) -> bytes:
    """The frame that comes before all others: what an engine's process is to serve, in JSON."""
    body = msgspec.json.encode(config)
    return _LENGTH.pack(len(body)) + body


def receive_config(connection: socket.socket) -> EngineConfig | None:
    """What `encode_config` made, and nothing of what follows; None if the other end is closed first."""
    with connection.makefile("rb", buffering=0) as file:
        head = _exactly(file, _LENGTH.size)
        body = _exactly(file, _LENGTH.unpack(head)[0]) if head else b""
    return msgspec.json.decode(body, type=EngineConfig) if body else None


def _exactly(file: io.RawIOBase, size: int) -> bytes:
    """So many bytes; none at all if the stream ends before."""
    data = b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            return b""
        data += more
    return data


class FrameReader:
    """Cuts a byte stream into frame bodies, whatever the sizes it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take in bytes as they arrive and return the bodies of all frames now complete."""
        self._buffer += data
        bodies = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes: the other end speaks another protocol")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies
