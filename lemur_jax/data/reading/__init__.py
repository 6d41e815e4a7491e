"""Readers of what people have: files of many formats, local or remote, to Documents.

storage     open, list and measure local files and fsspec's (gs://, s3://, memory://)
patterns    paths, globs and directories -> files; their formats; shards that are missing
formats     the table format -> reader, and how a file is cut into shards
lines       .jsonl(.gz, .zst) and plain text
columns     parquet, and the arrow files of a Hugging Face `save_to_disk` directory
examples    TFRecord, ArrayRecord, TFDS
hub         Hugging Face streams
where       the filters of SourceConfig.where
records     rows -> Documents: text, filters, held-out split; what happens to bad records
"""
