"""The parts of `vilu.train.fit`: batches, the loss, the head before the first step, validation, and one run's state."""
