"""The page of `findrec.evaluation.inspect_show`: see `findrec.evaluation.page` for its looks."""

TEMPLATE = """{% extends "frame" %}
{% block title %}{{ run }} · user {{ user }} · FindRec{% endblock %}
{% block body_class %} class="broad"{% endblock %}
{% block body %}
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
<div class="scroll"><table class="dense">
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
<figure><img alt="{{ curve.name }}" src="{{ curve.svg }}">
<figcaption>{{ curve.name }}: {{ curve.first }} → {{ curve.last }}</figcaption></figure>
{% endfor %}</div>{% else %}<p class="note">Not measured: model.align.diagnose_every was 0.</p>{% endif %}
{% endblock %}
"""
