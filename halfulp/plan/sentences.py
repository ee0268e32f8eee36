"""What a plan has to say, in English and Japanese: plain data, no logic."""

from collections.abc import Mapping

_ENGLISH = {
    "above": "{law}: {name} = {value:.3g} is {factor:.3g} times above what it was fitted on, "
    "{low:.3g} to {high:.3g}",
    "below": "{law}: {name} = {value:.3g} is below what it was fitted on, {low:.3g} to {high:.3g}",
    "far_speed": "speed of {precision}: published for {size:.3g} parameters, used for "
    "{parameters:.3g}",
    "law": "law {law}: {text}",
    "band": "band: {text}",
    "band_unpublished": "{law}: no errors that could make a band are published",
    "band_few": "{law} holds too few resamples for the ends of a band; fit again with --bootstrap "
    "{least} or more",
    "band_made": "the middle {percent:.0f} % of {draws} refits on resampled runs: the error of the "
    "law alone, without that of a seed, of your data or of your tokenizer",
    "repeated": "repeated tokens: {source}",
    "many_epochs": "more than {epochs} epochs: {text}",
    "speed": "speed of {precision}: {ratio:.3g} times BF16 ({low:.3g} to {high:.3g}): {source}",
    "formats": "loss added by formats: {source}; {text}",
    "served": "served tokens: {text}",
    "price": "price: {usd:.3g} $/GPU-hour, {source}",
    "rates": "learning rate and batch: halfway between two laws that were not fitted on yours",
    "yours": "yours",
    "listings": "listings of {date}: {source}",
    "asked": "as asked",
    "why_flops": "at equal FLOPs no format has a lower loss; others take fewer GPU-hours",
    "why_target": "the fewest GPU-hours to this loss",
    "why_loss": "the least loss in this GPU time",
    "memory": "weights, gradients and AdamW state take {state:.3g} GB ({bytes} bytes per "
    "parameter): at least {least} {gpus} of {gpu:g} GB, sharded",
    "memory_given": "{need}; {gpus} given",
    "gpu": "GPU",
    "gpus": "GPUs",
    "of_token_files": "that of the token files",
    "only_words": "none: words",
    "words_for_tokens": "{file} counted words and no tokens: words are taken as tokens. Count with "
    "--tokens and --tokenizer, or give --unique-tokens",
    "emergence": "n = {n}: the corpus holds {unique:.3g} distinct {n}-{unit} sequences{named}, "
    "{side} than the {parameters:.3g} parameters of the model; by Kausik's criterion scaling up "
    "{end} new skills",
    "emergence_named": " (tokenizer {tokenizer})",
    "more": "more",
    "no_more": "no more",
    "open": "may still uncover",
    "closed": "is not expected to uncover",
    "token": "token",
    "word": "word",
}

_JAPANESE = {
    "above": "{law}：{name} = {value:.3g} は、当てはめに使われた範囲 {low:.3g} 〜 {high:.3g} の"
    "上限の {factor:.3g} 倍",
    "below": "{law}：{name} = {value:.3g} は、当てはめに使われた範囲 {low:.3g} 〜 {high:.3g} を"
    "下回る",
    "far_speed": "{precision} の速度：公表値は {size:.3g} パラメータのもの、ここでは "
    "{parameters:.3g} パラメータに適用",
    "law": "法則 {law}：{text}",
    "band": "予測の幅：{text}",
    "band_unpublished": "{law}：幅を求められる誤差は公表されていない",
    "band_few": "{law}：再標本の数が少なく、幅の両端を求められない。--bootstrap {least} 以上で"
    "当てはめ直すこと",
    "band_made": "再標本した学習結果への当てはめ {draws} 回の中央 {percent:.0f} %。法則自体の誤差"
    "だけで、シード・データ・トークナイザーの違いによる誤差は含まない",
    "repeated": "繰り返し読むトークン：{source}",
    "many_epochs": "{epochs} エポック超：{text}",
    "speed": "{precision} の速度：BF16 の {ratio:.3g} 倍（{low:.3g} 〜 {high:.3g}）：{source}",
    "formats": "数値形式による損失の増加：{source}。{text}",
    "served": "推論のトークン：{text}",
    "price": "単価：GPU 1 時間あたり {usd:.3g} ドル、{source}",
    "rates": "学習率とバッチ：お使いのモデルで当てはめたものではない 2 つの法則の中間",
    "yours": "ご指定の値",
    "listings": "{date} の掲載価格：{source}",
    "asked": "ご指定のとおり",
    "why_flops": "同じ FLOPs で損失がより低くなる形式はない（ほかの形式では GPU 時間が減る）",
    "why_target": "この損失に達する GPU 時間が最も短い",
    "why_loss": "この GPU 時間で損失が最も低い",
    "memory": "重み・勾配・AdamW の状態に {state:.3g} GB（1 パラメータあたり {bytes} バイト）。"
    "分割して持つには {gpu:g} GB の GPU が少なくとも {least} 台必要",
    "memory_given": "{need}（ご指定は {gpus} 台）",
    "gpu": "GPU",
    "gpus": "GPU",
    "of_token_files": "トークンファイルのもの",
    "only_words": "なし（単語）",
    "words_for_tokens": "{file} は単語だけを数え、トークンを数えていない。単語をトークンと"
    "みなした。--tokens と --tokenizer を付けて数えるか、--unique-tokens を指定すること",
    "emergence": "n = {n}：コーパスに含まれる異なる {n} {unit}の列{named}は {unique:.3g} 個で、"
    "モデルのパラメータ {parameters:.3g} 個{side}。Kausik の基準では、モデルを大きくすると新しい"
    "能力が{end}",
    "emergence_named": "（トークナイザー {tokenizer}）",
    "more": "より多い",
    "no_more": "以下",
    "open": "現れる余地がある",
    "closed": "現れるとは見込まれない",
    "token": "トークン",
    "word": "単語",
}

SENTENCES: Mapping[str, Mapping[str, str]] = {"en": _ENGLISH, "ja": _JAPANESE}

# Why a precision is left out; the errors that say so are in English.
REFUSED_JAPANESE = {
    "units": "{precision}：{gpu} の行列演算器はこの形式に対応していない",
    "speed": "{precision}：{gpu} での速度は公表されていない。測定して --speed {precision}=比率 で"
    "指定すること",
    "peak": "{precision}：指定された速度では {gpu} の最大性能を超える",
    "target": "{precision}：目標の損失に届かない",
}
