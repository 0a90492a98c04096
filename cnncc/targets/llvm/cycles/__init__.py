"""What a CPU's scheduling model says of the inner loops of an engine, without the CPU."""
