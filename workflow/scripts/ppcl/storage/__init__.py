"""Files that are whole or absent, and known to be unchanged: atomic writes, seals, JSON, parquet
tables and their schemas, safetensors files, and checked readers of files that others made. May
import errors; every package above may import it.
"""
