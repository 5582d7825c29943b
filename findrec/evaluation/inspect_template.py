"""The page of `findrec.evaluation.inspect_show`: one file, no scripts, nothing fetched, light and dark."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ run }} · user {{ user }} · FindRec</title>
<style>
:root { --paper: #fdfdfb; --ink: #1d2329; --soft: #626b75; --line: #dcdfe3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15191d; --ink: #e4e7ea; --soft: #9aa4ae; --line: #323940; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 100rem; background: var(--paper);
       color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); }
p.note, figcaption, dt { color: var(--soft); font-size: .9rem; }
p.note { max-width: 52rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .4rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
.words { text-align: left; max-width: 18rem; overflow: hidden; text-overflow: ellipsis; }
.first { border-left: 3px solid var(--paper); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.25rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; }
</style>
</head>
<body>
<h1>user {{ user }}</h1>
<p class="note">run {{ run }}, the last {{ rows|length }} positions whose following event is known</p>

<h2>As a whole</h2>
<dl>{% for name, value in summary %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>

<h2>Position by position</h2>
<p class="note">Gates are coloured from 0 to 1: even gates look even. Every head has experts of its own, so
expert 1 of one head is not that of another; “expert” is the largest mean over heads. Leaving a modality out
at every item of the history moves the user vector (“moves”, in parts of its length) and changes the
log-probability of what followed (“owed”, in nats: what this modality brought, negative where it misled).
Modalities can stand in for each other, so the parts do not add up. Rank and log-probability of an event of
the training part were trained on; where an item has ties, the rank is their middle.</p>
<div class="scroll"><table>
<tr><th rowspan="2">#</th><th rowspan="2" class="words">time (UTC)</th>
<th rowspan="2" class="words">item</th><th rowspan="2" class="words">followed by</th>
<th rowspan="2" class="words">part</th><th rowspan="2">rank</th><th rowspan="2">log p</th>
<th rowspan="2">expert</th><th rowspan="2">entropy</th>
{% for h in range(heads) %}<th colspan="{{ experts }}" class="first">head {{ h + 1 }}</th>{% endfor %}
{% for name in columns %}<th colspan="2" class="first">{{ name }}</th>{% endfor %}</tr>
<tr>{% for h in range(heads) %}{% for e in range(experts) %}
<th{% if e == 0 %} class="first"{% endif %}>{{ e + 1 }}</th>{% endfor %}{% endfor %}
{% for name in columns %}<th class="first">moves</th><th>owed</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.step.place }}</td><td class="words">{{ row.step.time }}</td>
<td class="words" title="{{ row.step.item }}">{{ row.step.item }}</td>
<td class="words" title="{{ row.step.followed }}">{{ row.step.followed }}</td>
<td class="words">{{ row.step.part }}</td><td>{{ row.rank }}</td><td>{{ row.log_probability }}</td>
<td>{{ row.expert }}</td><td>{{ row.entropy }}</td>
{% for head in row.heads %}{% for cell in head %}
<td{% if loop.first %} class="first"{% endif %} style="background: {{ cell.colour }}">{{ cell.text }}</td>
{% endfor %}{% endfor %}
{% for cell in row.contributions %}
<td{% if loop.index0 is divisibleby 2 %} class="first"{% endif %}
 style="background: {{ cell.colour }}">{{ cell.text }}</td>
{% endfor %}</tr>
{% endfor %}</table></div>

<h2>Alignment to the ID stream, before and after</h2>
{% if curves %}<p class="note">Measured while training, on the items of a step (see
findrec/models/alignment.py): ksd is the Stein discrepancy from the ID vectors (0: the same distribution),
latent_cosine the cosine between an item's latent and its own ID vector, latent_std and latent_rank fall
where latents collapse.</p>
<div class="curves">{% for curve in curves %}
<figure><img alt="{{ curve.name }}" src="data:image/svg+xml;base64,{{ curve.svg }}">
<figcaption>{{ curve.name }}: {{ curve.first }} → {{ curve.last }}</figcaption></figure>
{% endfor %}</div>{% else %}<p class="note">Not measured: model.align.diagnose_every was 0.</p>{% endif %}
</body>
</html>
"""
