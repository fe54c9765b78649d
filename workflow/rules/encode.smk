# The user's own pictures and captions, encoded once by the stock pipeline, for fine-tuning.
#
# in:  the teacher; the folder or table that finetune.data, or a variant's finetune_data, names
# out: encode/<data>.parquet, what the transformer would get of each picture without noise
#
# Finished batches wait in state/encode-<data>, as in record.smk.


rule encode:
    input:
        **launched("encode.py"),
        teacher=teacher_files(),
    output:
        encoded=result("encode/{data}.parquet"),
    log:
        result("logs/encode-{data}.log"),
    benchmark:
        result("benchmarks/encode-{data}.tsv")
    wildcard_constraints:
        data="[0-9a-f]{12}",
    conda:
        ENVIRONMENT
    threads: THREADS
    resources:
        **limits("encode", mem_mb=16000, runtime=1440, launched=True),
    params:
        config=subset("seed", "device", "teacher", "pipeline", "finetune.heldout_fraction"),
        data=lambda wildcards: data_sets()[wildcards.data],
        state=lambda wildcards: result(f"state/encode-{wildcards.data}"),
        teacher=teacher_stamp(),
        pictures=lambda wildcards: data_stamp(data_sets()[wildcards.data]),
        code=code("encode.py"),
    message:
        "Encoding the pictures of {params.data}"
    shell:
        command("--data {params.data:q}", "output.encoded", "params.state", launched=True)
