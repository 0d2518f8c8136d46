"""Recognises files of other tools by their first bytes, to say what to do with them."""

ONNX = "an ONNX model"


def name_of(head: bytes) -> str | None:
    """What the file beginning with `head` [512 bytes] is, and how to convert it; None when it is
    not recognised."""
    if head[4:8] == b"TFL3":
        return (
            "a TFLite model (TensorFlow Lite) with rounded weights; export the original model as"
            " ONNX"
        )
    if is_onnx(head):
        return f"{ONNX}, or the beginning of one"
    if head[:1] == b"\x08" and head[1:2] in (b"\x00", b"\x01") and head[2:3] == b"\x12":
        return "a TensorFlow SavedModel; convert it with tf2onnx"
    if head[:3] == b"\x0a\x00\x12" or head.startswith((b"\x0a\x0b", b"\x0a\x0d")):
        return "a TensorFlow protobuf file; convert it with tf2onnx"
    first, second = head[:1], head[1:2]
    if (b"\x80" < first <= b"\x8f" and b"\xa0" <= second <= b"\xbf") or first in (b"\xde", b"\xdf"):
        return "a msgpack file, as written by Flax; save the variables with Orbax or safetensors"
    if head.startswith(b"GGUF"):
        return "a GGUF file of a language model"
    return None


def is_onnx(head: bytes) -> bool:
    """Whether `head` is the beginning of an ONNX model: the field `ir_version`, then text fields
    like the producer's name."""
    tags = (b"\x12", b"\x1a", b"\x3a")
    return head[:1] == b"\x08" and b"\x03" <= head[1:2] <= b"\x40" and head[2:3] in tags
