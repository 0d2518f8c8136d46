"""Classifiers exported as graphs, ONNX files and torch.export archives, as nets that can be
trained, and back to ONNX."""
