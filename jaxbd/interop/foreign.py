"""What a file is that is no weight file of PyTorch's, told by its first bytes."""

ONNX = "an ONNX model"


def name_of(head: bytes) -> str | None:
    """The kind of the file that begins with `head` [512 bytes], with what to do about it; None
    where it is not known."""
    if head[4:8] == b"TFL3":
        return (
            "a TFLite model (TensorFlow Lite), whose weights are rounded; export the original model"
            " as ONNX"
        )
    if is_onnx(head):
        return f"{ONNX}, or the beginning of one"
    if head[:1] == b"\x08" and head[1:2] in (b"\x00", b"\x01") and head[2:3] == b"\x12":
        return "a SavedModel of TensorFlow's; convert it with tf2onnx"
    if head[:3] == b"\x0a\x00\x12" or head.startswith((b"\x0a\x0b", b"\x0a\x0d")):
        return "a protobuf file of TensorFlow's; convert it with tf2onnx"
    first, second = head[:1], head[1:2]
    if (b"\x80" < first <= b"\x8f" and b"\xa0" <= second <= b"\xbf") or first in (b"\xde", b"\xdf"):
        return "a msgpack file, as Flax writes them; save the variables with Orbax or safetensors"
    if head.startswith(b"GGUF"):
        return "a GGUF file of a language model"
    return None


def is_onnx(head: bytes) -> bool:
    """Whether `head` begins as an ONNX model: the field `ir_version`, then text fields such as the
    producer's name."""
    tags = (b"\x12", b"\x1a", b"\x3a")
    return head[:1] == b"\x08" and b"\x03" <= head[1:2] <= b"\x40" and head[2:3] in tags
