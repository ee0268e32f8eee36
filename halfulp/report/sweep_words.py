"""The words of the page for whoever decides, in English and Japanese: plain data, no logic."""

from collections.abc import Mapping

LANGUAGES = ("en", "ja")

_ENGLISH = {
    "kicker": "Lower precision for training: decision page · {name}",
    "adopt": "Introduce {recipe} in stages, in place of {reference}.",
    "wait": "Could not tell yet: stay with {reference}, and let a pilot of {recipe} decide.",
    "stay": "Stay with {reference}: no lower precision came through.",
    "evidence": "Evidence: {done} of {cells} runs, {recipes} precisions × {rates} learning "
    "rates × {seeds} seeds{data}; {parameters} parameters, {tokens} tokens per run.",
    "data": " × {n} data sets",
    "pass": "pass",
    "fail": "fail",
    "could not tell": "could not tell",
    "reference": "reference",
    "money": "A successful run with {reference} is expected to cost {reference_usd}, failed "
    "attempts and the search for a learning rate included; with {recipe} {usd}.",
    "money_hours": "A successful run with {reference} is expected to take {reference_hours} "
    "GPU-hours, failed attempts and the search for a learning rate included; with {recipe} "
    "{hours}.",
    "money_reference": "A successful run with {reference} is expected to cost {reference_usd}"
    ", failed attempts and the search for a learning rate included.",
    "money_ratio": "Failed attempts and the search for a learning rate included, a successful "
    "run with {recipe} is expected to cost {ratio} of one with {reference}.",
    "money_even": "It pays where it makes the training step more than {even} times as fast.",
    "money_window": "What {recipe} costs could not be told: the range of safe learning rates "
    "of {unknown} is not known.",
    "money_speed": "What {recipe} costs could not be told: no speed-up was given, and none is "
    "published for this hardware.",
    "money_none": "Nothing was said about price, hours or speed-up, so this page says nothing "
    "about money.",
    "loss": "loss above {reference}",
    "loss_note": "nats per token, {ends}; allowed: {bar}",
    "failed": "runs failed",
    "failed_note": "so at most {upper} fail (95 % confidence); {reference}: {other}",
    "cost": "total cost, {reference} = 1",
    "cost_note": "{ends}, at {speed} times the speed",
    "cost_unknown": "the text above says why",
    "unasked": "not asked",
    "unasked_note": "no price, hours or speed-up was given",
    "unknown": "could not tell",
    "interval": "95 % between {low} and {high}",
    "no_interval": "its interval is not known",
    "verdicts": "What was found",
    "columns": "precision|verdict|loss above reference|failed|safe rates, octaves|"
    "total cost|pays above speed-up",
    "octaves": "{octaves} octaves",
    "tiny": "under {share}",
    "at_least": "at least {octaves}",
    "no_window": "none",
    "refused": "the model cannot take it",
    "family": "{n} precisions are judged, each at {level}, so that all verdicts hold together at "
    "95 %; the intervals shown are 95 % each.",
    "nats": "{bar} nats per token make perplexity, among how many words the model wavers, {more} "
    "larger.",
    "more": "{n} more precisions are in the engineers' page.",
    "bill": "Expected total cost until one run has succeeded, {reference} = 1",
    "bill_parts": "one run|its retries|search for the learning rate",
    "bill_note": "Bars: medians; lines: 95 % intervals. No bar: no finite cost.",
    "risk": "Risk",
    "risk_failures": "{recipe}: {failed} of {runs} runs failed at its best learning rate. "
    "With 95 % confidence at most {upper} fail; {needed} runs without a further failure would "
    "show that 90 % succeed.",
    "risk_failures_shown": "{recipe}: {failed} of {runs} runs failed at its best learning "
    "rate. With 95 % confidence at most {upper} fail.",
    "risk_failures_none": "{recipe}: no run has a known outcome yet, so its risk of failing "
    "is not known.",
    "risk_horizon": "One run of the sweep has {share} of the tokens of the run to decide on. "
    "What fails later was not seen: {needed} tokens without a failure would show that 90 % "
    "succeed.",
    "risk_short": "The runs of the sweep are short: what fails later, or only in a larger model, "
    "was not seen. A sweep can refute a precision, not certify it.",
    "risk_window": "Safe learning rates: {octaves} for {recipe}, {other} for {reference}; an "
    "octave is a factor of two.",
    "risk_lost": "Lost runs: {lost}; not done: {missing}. In failures and cost lost ones "
    "count as they hurt most.",
    "plan": "Introduction in stages",
    "plan_columns": "stage|what is done|go on only if|otherwise",
    "plan_none": "There is nothing to introduce. Look again when a precision meets the bar of "
    "{bar} nats with no more failures than {reference}.",
    "stage_1": "1 Reference",
    "do_1": "Train {reference} at the planned setting first, {seeds} seeds, learning rate "
    "{rate}. Keep losses and checkpoints.",
    "gate_1": "Of {seeds} runs at most {allowed} fail; final losses differ by less than "
    "{spread} nats (what the sweep's seeds differ by, and chance).",
    "gate_1_none": "None of {seeds} runs fails; final losses differ by less than {spread} "
    "nats (what the sweep's seeds differ by, and chance).",
    "back_1": "Nothing to roll back: this is today's practice. Mend the reference first.",
    "stage_2": "2 Pilot",
    "do_2": "{recipe} with the same seeds and data order at learning rates {low} to {high}, "
    "up to {needed} short runs.",
    "gate_2": "The whole 95 % interval of the loss difference is below {bar} nats; no failure "
    "in {needed} runs (shows 90 %); saturation at most {saturation}, lost updates at most "
    "{lost}.",
    "back_2": "Stop, and stay with {reference}. Only the pilot is lost.",
    "stage_3": "3 One real run",
    "do_3": "First {share} of the steps in {reference}, then {recipe}, under the guard, which "
    "keeps a snapshot every {every} steps.",
    "do_3_staged": "{recipe} from its first stage on, under the guard, which keeps a snapshot "
    "every {every} steps.",
    "gate_3": "Loss at most {bar} nats above stage 1 at equal tokens; at most {raised} of the "
    "blocks raised to 16 bits, at most {wasted} of the steps thrown away; {speed}.",
    "gate_3_even": "the measured step is at least {even} times as fast, where it pays at 90 % "
    "success",
    "gate_3_speed": "the measured step is faster than with {reference}",
    "back_3": "The guard goes back to a snapshot and raises the blocks at fault; beyond these "
    "limits it puts all in BF16, or stops.",
    "stage_4": "4 Standard",
    "do_4": "{recipe} for all runs of this kind, up to {most} tokens; longer ones pass stage "
    "3 again.",
    "do_4_same": "{recipe} for runs no longer than that of stage 3; longer ones pass stage 3 "
    "again.",
    "gate_4": "Guard and counters stay on. {failures}.",
    "gate_4_even": "At most {share} of the runs fail: above that it does not pay",
    "gate_4_reference": "No larger share of the runs fails than with {reference}",
    "back_4": "One line of the configuration brings {reference} back; its baseline is kept.",
    "assumed": "What is assumed",
    "given": "Given: {items}.",
    "standing": "Not given, and taken instead: {items}.",
    "given_hours": "{hours} GPU-hours per run",
    "given_price": "{price} dollars per GPU-hour",
    "given_speed": "speed-up {speed}",
    "given_tokens": "{tokens} tokens per run",
    "assumed_price": "price {low} to {high} dollars per hour of {gpu}",
    "assumed_speed": "speed-up of {recipe} {value} ({low} to {high})",
    "assumed_octaves": "the best learning rate is uncertain by {value} octaves (the grid of "
    "this sweep)",
    "assumed_proxy": "a run of the search costs {value} of a run (assumption)",
    "assumed_seeds": "the search takes one seed (assumption)",
    "assumed_abandoned": "a failing run is given up halfway (assumption, where none failed)",
    "assumed_model": "Attempts succeed independently and as often as in the sweep; a failed "
    "one starts again from the beginning. Step times of the sweep are simulated and not used.",
    "source": "{text} ({source}{date})",
    "made": "Made by halfulp from {command}. Intervals are 95 %.",
}

_JAPANESE = {
    "kicker": "学習の低精度化：導入判断資料 · {name}",
    "adopt": "{reference} に代えて {recipe} を段階的に導入する。",
    "wait": "現時点では判定できない。{reference} を維持し、{recipe} の小規模試行で判断する。",
    "stay": "{reference} を維持する。要件を満たす低精度方式はなかった。",
    "evidence": "根拠：学習実験 {cells} 件中 {done} 件（精度方式 {recipes} 種 × 学習率 {rates}"
    " 点 × シード {seeds} 個{data}）。モデルは {parameters} パラメータ、1 件あたり {tokens} "
    "トークン。",
    "data": " × データ {n} 種",
    "pass": "合格",
    "fail": "不合格",
    "could not tell": "判定できず",
    "reference": "基準",
    "money": "失敗のやり直しと学習率の探索を含め、学習を 1 回成功させる費用の見込みは、"
    "{reference} で {reference_usd}、{recipe} で {usd}。",
    "money_hours": "失敗のやり直しと学習率の探索を含め、学習を 1 回成功させる GPU 時間の見込み"
    "は、{reference} で {reference_hours} 時間、{recipe} で {hours} 時間。",
    "money_reference": "失敗のやり直しと学習率の探索を含め、学習を 1 回成功させる費用の見込み"
    "は、{reference} で {reference_usd}。",
    "money_ratio": "失敗のやり直しと学習率の探索を含め、学習を 1 回成功させる費用の見込みは、"
    "{recipe} で {reference} の {ratio}。",
    "money_even": "学習ステップの高速化率が {even} 倍を超える場合に採算が合う。",
    "money_window": "{recipe} の費用は判定できない（{unknown} の安全な学習率の範囲が不明）。",
    "money_speed": "{recipe} の費用は判定できない（高速化率の指定がなく、対象 GPU の公表値もな"
    "い）。",
    "money_none": "単価・GPU 時間・高速化率の指定がないため、費用については何も述べない。",
    "loss": "{reference} に対する損失の増加",
    "loss_note": "nats/トークン、{ends}。許容値 {bar}",
    "failed": "学習の失敗件数",
    "failed_note": "失敗率は信頼度 95 % で最大 {upper}。{reference} は {other}",
    "cost": "総費用（{reference} = 1）",
    "cost_note": "{ends}、速度 {speed} 倍の場合",
    "cost_unknown": "理由は上の本文を参照",
    "unasked": "対象外",
    "unasked_note": "単価・GPU 時間・高速化率の指定なし",
    "unknown": "判定できず",
    "interval": "95 % 区間 {low} 〜 {high}",
    "no_interval": "区間は不明",
    "verdicts": "評価結果",
    "columns": "精度方式|判定|基準に対する損失増|失敗|学習率の幅|総費用|損益分岐の高速化率",
    "octaves": "{octaves} オクターブ",
    "tiny": "{share} 未満",
    "at_least": "{octaves} 以上",
    "no_window": "なし",
    "refused": "このモデルでは使用不可",
    "family": "{n} 方式を同時に判定するため、各判定は {level} の水準で行い、全体として 95 % を"
    "保つ。表示の区間はそれぞれ 95 %。",
    "nats": "{bar} nats/トークンは、パープレキシティ（次の単語の候補の実質的な数）の {more} "
    "の増加にあたる。",
    "more": "ほかの {n} 方式は技術者向けの資料を参照。",
    "bill": "学習を 1 回成功させるまでの総費用の見込み（{reference} = 1）",
    "bill_parts": "学習 1 回分|失敗のやり直し|学習率の探索",
    "bill_note": "棒は中央値、線は 95 % 区間。棒がないものは費用が有限にならない。",
    "risk": "リスク",
    "risk_failures": "{recipe} は最良の学習率で {runs} 件中 {failed} 件失敗。失敗率は信頼度 "
    "95 % で最大 {upper}。成功率 90 % を示すには、追加の失敗なしに {needed} 件が必要。",
    "risk_failures_shown": "{recipe} は最良の学習率で {runs} 件中 {failed} 件失敗。失敗率は"
    "信頼度 95 % で最大 {upper}。",
    "risk_failures_none": "{recipe} は結果の判明した実験がまだなく、失敗のリスクは不明。",
    "risk_horizon": "実験 1 件のトークン数は、対象とする学習の {share}。その先で起こる失敗は"
    "観測していない。成功率 90 % を示すには、失敗なしに {needed} トークンが必要。",
    "risk_short": "実験は短い。学習の後半や、より大きなモデルだけで起こる失敗は観測"
    "していない。小規模実験は方式を否定できるが、保証はできない。",
    "risk_window": "安全な学習率の幅：{recipe} は {octaves}、{reference} は {other}（1 "
    "オクターブ = 2 倍）。",
    "risk_lost": "結果不明の実験が {lost} 件、未実施が {missing} 件。結果不明の分は、失敗率と"
    "費用では最も不利な側で数えた。",
    "plan": "段階的な導入計画",
    "plan_columns": "段階|実施内容|次へ進む条件|満たさない場合",
    "plan_none": "導入の候補はない。損失の増加が {bar} nats 未満、かつ失敗が {reference} 以下"
    "の方式が現れた時点で再検討する。",
    "stage_1": "1 基準の確立",
    "do_1": "まず {reference} を本番の設定で学習する（シード {seeds} 個、学習率 {rate}）。損失"
    "とチェックポイントを保存する。",
    "gate_1": "{seeds} 件中の失敗が {allowed} 件以下、最終損失の差が {spread} nats 未満（この実験"
    "のばらつきに偶然の幅を加えた値）。",
    "gate_1_none": "{seeds} 件とも成功し、最終損失の差が {spread} nats 未満（この実験のばらつきに"
    "偶然の幅を加えた値）。",
    "back_1": "切り戻しは不要（現行の運用）。先に基準側の問題を解消する。",
    "stage_2": "2 小規模試行",
    "do_2": "{recipe} を同じシード・同じデータ順で、学習率 {low} 〜 {high}、短い学習を最大 "
    "{needed} 件。",
    "gate_2": "損失差の 95 % 区間全体が {bar} nats 未満。{needed} 件で失敗なし（成功率 90 % を"
    "示す）。数値の飽和は {saturation} 以下、重み更新の消失は {lost} 以下。",
    "back_2": "中止し {reference} を維持する。失うのは試行の費用のみ。",
    "stage_3": "3 本番 1 件",
    "do_3": "最初の {share} のステップは {reference}、以降は {recipe}。監視機能（ガード）を"
    "有効にし、{every} ステップごとにスナップショットを取る。",
    "do_3_staged": "{recipe} を最初の段階から適用する。監視機能（ガード）を有効にし、{every} "
    "ステップごとにスナップショットを取る。",
    "gate_3": "同じトークン数での損失が段階 1 を {bar} nats 以上上回らない。16 ビット以上に引"
    "き上げたブロックが {raised} 以下、破棄したステップが {wasted} 以下。{speed}。",
    "gate_3_even": "実測の学習ステップが {even} 倍以上速い（成功率 90 % での損益分岐）",
    "gate_3_speed": "実測のステップ時間が {reference} より短い",
    "back_3": "ガードがスナップショットまで戻し、原因のブロックの精度を上げる。上限を超えた"
    "場合はモデル全体を BF16 に切り替えるか、学習を止める。",
    "stage_4": "4 標準化",
    "do_4": "同種の学習（最大 {most} トークン）に {recipe} を適用する。より長い学習は段階 3 か"
    "らやり直す。",
    "do_4_same": "段階 3 以下の長さの学習に {recipe} を適用する。より長い学習は段階 3 からやり"
    "直す。",
    "gate_4": "ガードとカウンタは常時有効。{failures}。",
    "gate_4_even": "失敗率が {share} 以下（これを超えると採算が合わない）",
    "gate_4_reference": "失敗率が {reference} を上回らない",
    "back_4": "設定 1 行で {reference} に戻せる。比較の基準は保存してある。",
    "assumed": "前提条件",
    "given": "指定された値：{items}。",
    "standing": "指定がなく、代わりに用いた値：{items}。",
    "given_hours": "1 回の学習に {hours} GPU 時間",
    "given_price": "GPU 1 時間あたり {price} ドル",
    "given_speed": "高速化率 {speed}",
    "given_tokens": "1 回の学習に {tokens} トークン",
    "assumed_price": "{gpu} の単価は 1 時間 {low} 〜 {high} ドル",
    "assumed_speed": "{recipe} の高速化率は {value}（{low} 〜 {high}）",
    "assumed_octaves": "最良の学習率の不確かさは {value} オクターブ（この実験の学習率の範囲）",
    "assumed_proxy": "学習率探索の 1 件は本番 1 回の {value}（仮定）",
    "assumed_seeds": "探索のシードは 1 個（仮定）",
    "assumed_abandoned": "失敗する学習は半分で打ち切る（失敗例がない方式についての仮定）",
    "assumed_model": "各回の成否は独立で、確率はこの実験と同じ。失敗した場合は最初からやり直"
    "す。実験のステップ時間はシミュレーションによるもので、用いていない。",
    "source": "{text}（出典：{source}{date}）",
    "made": "halfulp が {command} から作成。区間はすべて 95 %。",
}

TEXTS: Mapping[str, Mapping[str, str]] = {"en": _ENGLISH, "ja": _JAPANESE}
