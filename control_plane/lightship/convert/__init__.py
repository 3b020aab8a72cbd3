"""Conversion to ONNX in a bounded process, and the parity gate."""
