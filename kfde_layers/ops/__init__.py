"""The operations, a page each: equations, public function, checks, and the operator for TorchScript."""
