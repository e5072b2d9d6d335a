"""The vocabulary of quantized graphs: the operators that passes write and backends read."""
