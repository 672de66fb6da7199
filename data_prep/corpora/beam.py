"""Building shards on Apache Beam (the `beam` extra): one element a shard, each made by the very function that one
machine uses, so that the bytes are the same.

Every worker must see the run's folder and the corpus at the same paths, as on a shared file system. Of the run workers
read the images alone: what its database holds they take from a snapshot, which is made first and lies with the corpus.
"""

from data_prep.corpora.job import BuildJob
from silkie_jax.errors import UserError


def run_on_beam(job: BuildJob, options: list[str]) -> None:
    """Makes all shards of a job; `options` are Beam's own, such as `--runner=FlinkRunner`.

    Raises:
        UserError: apache-beam is not installed, or does not know an option.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--runner beam needs apache-beam: pip install 'silkie-jax[beam]'") from None
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "Shards" >> beam.Create(range(job.shards))
            | "Spread" >> beam.Reshuffle()
            | "Make" >> beam.Map(_make, job)
        )


def _make(number: int, job: BuildJob) -> str:
    """Makes a shard; its entry lies beside it, for the process that finishes the corpus."""
    return job.make(number).shard.file
