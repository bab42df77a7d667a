import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from judge import paired_ratios, printed_ratios
from peer import parsed
from quality import check_same_types
from texts import corpus_text, package_prose

from bitsmith.lab.synth import synth
from bitsmith.numerics.divergence import TokenScores
from bitsmith.run.corpus import documents
from bitsmith.run.execute import compress

# printed by the llama-perplexity of llama-cpp-python 0.3.34
PRINTED = """\
   8      48.4228 ±    3.2075       0.03767 ±    0.00926       0.06666 ±    0.00115     5.242 ±  0.201 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  48.422846 ±   3.207467
Mean PPL(base)                :  46.632654 ±   3.097592
Cor(ln(PPL(Q)), ln(PPL(base))):  99.03%
Mean ln(PPL(Q)/PPL(base))     :   0.037671 ±   0.009259
Mean PPL(Q)/PPL(base)         :   1.038389 ±   0.009614
Mean PPL(Q)-PPL(base)         :   1.790192 ±   0.453386

====== KL divergence statistics ======
Mean    KLD:   0.066655 ±   0.001146
Maximum KLD:   0.445685
99.9%   KLD:   0.371684
99.0%   KLD:   0.253795
Median  KLD:   0.057057

====== Token probability statistics ======
Same top p: 82.745 ± 0.837 %
"""


def test_what_llama_perplexity_prints_is_read() -> None:
    figures = parsed(PRINTED)
    assert figures["mean_kld"] == 0.066655
    assert figures["mean_kld_se"] == 0.001146
    assert figures["kld_99_9"] == 0.371684
    assert figures["ln_ppl_ratio"] == 0.037671
    assert figures["ppl_cand"] == 48.422846
    assert figures["ppl_ref"] == 46.632654
    assert figures["top1_percent"] == 82.745


def test_a_run_whose_last_lines_are_lost_is_not_taken_for_a_result() -> None:
    with pytest.raises(SystemExit, match="Same top p"):
        parsed(PRINTED.partition("Same top")[0])


def test_printed_ratios_propagate_both_errors() -> None:
    figures = parsed(PRINTED)
    ratio = printed_ratios({**figures, "mean_kld": figures["mean_kld"] / 2}, figures)
    assert ratio["mean_kld"] == pytest.approx(0.5)
    relative = 0.001146 / 0.066655
    assert ratio["mean_kld_se"] == pytest.approx(0.5 * relative * 5**0.5)
    assert ratio["ln_ppl"] == 0


def test_paired_ratios_have_no_spread_where_every_chunk_has_the_same_ratio() -> None:
    rng = np.random.default_rng(0)
    kld = rng.exponential(size=(6, 50))
    nll = rng.exponential(size=(6, 50))
    peers = TokenScores(nll, nll + 0.1, kld, kld > 1)
    found = paired_ratios(replace(peers, kld=kld / 4, nll_cand=nll), peers)
    assert found["mean_kld"] == pytest.approx([0.25] * 3)
    assert found["kld_99_9"] == pytest.approx([0.25] * 3)
    assert found["ppl"] == pytest.approx([np.exp(-0.1)] * 3)
    assert found["top1"] == [0, 0, 0]
    low, high = paired_ratios(replace(peers, kld=rng.exponential(size=(6, 50))), peers)["mean_kld"][1:]
    assert low < high


def test_files_that_differ_in_one_tensors_type_are_refused(tmp_path: Path) -> None:
    model = synth(tmp_path / "m", "tiny", vision=False)
    same, other = tmp_path / "same.gguf", tmp_path / "other.gguf"
    compress(model, same, "Q4_0")
    compress(model, other, "Q4_0", tensor_types=[("blk.0.ffn_down", "Q5_0")])
    check_same_types(same, same)
    with pytest.raises(SystemExit, match=r"blk\.0\.ffn_down\.weight: ours Q4_0, peer's Q5_0"):
        check_same_types(same, other)


def test_calibration_text_is_spread_over_the_documents_and_not_held_out() -> None:
    text = corpus_text(20_000, held_out=False)
    assert len(text.encode()) >= 20_000 * 6
    assert text == corpus_text(20_000, held_out=False)
    heads = [piece[:200] for piece in documents(held_out=True) if len(piece) > 200]
    assert not any(head in text for head in heads)
    first = "".join(islice(documents(held_out=False), 100))[:120_000]
    assert text[:2000] not in first


def test_prose_has_no_code_and_repeats_nothing() -> None:
    paragraphs = [each for each in package_prose(10_000).split("\n") if each]
    assert len(paragraphs) > 20
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [each for each in paragraphs if "http" in each or each.startswith(">>>")]
