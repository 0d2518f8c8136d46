"""Reads classifiers exported as graphs (ONNX files and torch.export archives) as nets that can be
trained, and writes nets as ONNX."""
