"""Scores systems on lists into OUT/rows.jsonl and OUT/clips.jsonl, and prints the table.

    python recipes/benchmark.py reconstruction --codec DIR --cuts CUTS --judge DIR --out OUT
    python recipes/benchmark.py tokens --codec DIR --train CUTS --dev CUTS --judge DIR --out OUT
    python recipes/benchmark.py tts --list RESULTS.jsonl --judge DIR --out OUT
    python recipes/benchmark.py tts --texts TEXTS.jsonl --run 'COMMAND' --judge DIR --out OUT
    python recipes/benchmark.py asr --list TRANSCRIPTS.jsonl --out OUT
    python recipes/benchmark.py asr --recordings LIST.jsonl --voice DIR --out OUT
    python recipes/benchmark.py vc --pairs PAIRS.jsonl --voice DIR --judge DIR --out OUT
    python recipes/benchmark.py speed --codec DIR --random mimi --out OUT
    python recipes/benchmark.py compare OUT_A OUT_B
    python recipes/benchmark.py report OUT... --html FILE
    python recipes/benchmark.py ratings FILES... --out OUT

An interrupted run resumes: the scores of each utterance lie in OUT/utterances/, one file per system
and judge.
"""

import argparse
from collections.abc import Sequence

from codec.program import ArgumentParser
from recipes.lib.run import run_recipe
from recipes.scoring import asr, compare, ratings, reconstruction, report, speed, tokens, tts, vc
from recipes.scoring.options import report_rows


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments of one part."""
    parser = ArgumentParser(description="Scores systems on lists.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    reconstruction.add_reconstruction_command(kinds)
    tokens.add_tokens_command(kinds)
    tts.add_tts_command(kinds)
    asr.add_asr_command(kinds)
    vc.add_vc_command(kinds)
    speed.add_speed_command(kinds)
    compare.add_compare_command(kinds)
    report.add_report_command(kinds)
    ratings.add_ratings_command(kinds)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Runs one part of the benchmark."""
    args = parse_arguments(argv)
    if args.kind == "report":
        report.write_report(args)
        return
    if args.kind == "compare":
        compare.print_comparison(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.kind == "reconstruction":
        reconstruction.benchmark_reconstruction(args)
    elif args.kind == "tokens":
        tokens.benchmark_tokens(args)
    elif args.kind == "tts":
        tts.benchmark_tts(args)
    elif args.kind == "asr":
        asr.benchmark_asr(args)
    elif args.kind == "vc":
        vc.benchmark_vc(args)
    elif args.kind == "ratings":
        ratings.score_ratings(args)
    else:
        report_rows(args.kind, args.out, speed.benchmark_speed(args))


if __name__ == "__main__":
    run_recipe(main)
