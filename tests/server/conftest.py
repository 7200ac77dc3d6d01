"""The bundles of the SDK's tests, for the tests of what stands on the SDK."""

from tests.sdk.conftest import onnx_bundle, pte_bundle  # noqa: F401
