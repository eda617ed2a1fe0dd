"""The operations: reference mathematics, the public function and the operator of each."""
