"""Exported policies: the artefact, its loader, and ONNX."""
