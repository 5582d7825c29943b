"""The page of `findrec.evaluation.report_page`; see `findrec.evaluation.page` for its looks."""

TEMPLATE = """{% extends "frame" %}
{% block title %}{{ name }} · FindRec report{% endblock %}
{% macro plots(drawn) %}<div class="curves">{% for plot in drawn %}
<figure{% if plot.broad %} class="broad-figure"{% endif %}><img alt="{{ plot.title }}" src="{{ plot.uri }}">
<figcaption>{{ plot.title }}{% if plot.note %}: {{ plot.note }}{% endif %}</figcaption></figure>
{% endfor %}</div>{% endmacro %}
{% macro grid(table) %}<div class="scroll"><table class="wide{% if table.dense %} dense{% endif %}">
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}
{% if cell.error %}<small>± {{ cell.error }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% macro item(one) %}{% if one.item in thumbnails %}<img alt="" src="{{ thumbnails[one.item] }}">
{% endif %}{{ one.text }}{% endmacro %}
{% block body %}
<h1>{{ name }}</h1>
<p class="soft">{{ data.recipe }}: {{ "{:,}".format(data.num_users) }} users,
{{ "{:,}".format(data.num_items) }} items, {{ "{:,}".format(data.num_events) }} events,
longest history {{ "{:,}".format(data.longest) }}; {{ "%.1f"|format(100 * data.repeat_rate) }} % of the
training events repeat an item,
{{ "%.1f"|format(100 * data.tied_last_rate) }} % of the users have a tied last timestamp.</p>
<nav>{% for title in ("Results", "Training", "Routing and alignment", "Robustness", "Serving",
"Sample recommendations", "Environment", "Configuration") %}
<a href="#{{ title|lower|replace(" ", "-") }}">{{ title }}</a>{% endfor %}</nav>

<h2 id="results">Results</h2>
{% for table in tables %}
<h3>{{ table.split }}</h3>
{% for line in table.protocols %}<p class="note">{{ line }}</p>{% endfor %}
{{ grid(table) }}
{% else %}<p class="note">Not evaluated yet.</p>{% endfor %}
{% if tables %}<p class="note">± is half of the 95 % interval of the mean over users. A coloured number is the
largest (mean rank: the smallest) of its column.</p>{% endif %}
{% if differences %}<h3>Which differences are real</h3>
<p class="note">{{ differences.note }}</p>
{% if differences.rows %}{{ grid(differences) }}{% endif %}{% endif %}
{% if strata %}<h3>Parts of the test cases</h3>
{{ plots(strata_plots) }}
<details><summary>as a table</summary>{{ grid(strata) }}</details>{% endif %}
{% if lists %}<h3>What the lists are like</h3>
<p class="note">Of the first k items of every test user: coverage is the share of the catalogue that is
shown to anyone; gini is 0 where all items are shown alike and near 1 where few take all places; novelty is
the mean information of an item in bits (rare ones have more); ils is the mean cosine of two items of a
list.</p>
{{ plots(list_plots) }}
<details><summary>as a table</summary>{{ grid(lists) }}</details>{% endif %}
{% if sampled %}<details><summary>Sampled metrics (not comparable)</summary>
<p class="note">{{ sampled.note }}</p>{{ grid(sampled) }}</details>{% endif %}

<h2 id="training">Training</h2>
{% if curves %}{{ plots(curves) }}{% else %}<p class="note">No logged values.</p>{% endif %}

<h2 id="routing-and-alignment">Routing and alignment</h2>
{% if inspection %}
<p class="note">The last positions of user {{ inspection.user }}: how the gates of each head share its
experts, how far the user vector moves without a modality, and how much log-probability of what followed is
owed to it.
<code>findrec inspect {{ name }} --user ID</code> shows any user in numbers.</p>
{{ plots(inspection.plots) }}
<dl>{% for what, value in inspection.summary %}<dt>{{ what }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>{% else %}<p class="note">This run routes no modalities.</p>{% endif %}
{% if alignment %}<h3>Alignment to the ID stream over training</h3>
{{ plots(alignment) }}{% endif %}

<h2 id="robustness">Robustness</h2>
{% for suite in suites %}<h3>{{ suite.title }}</h3>
<p class="note">{{ suite.note }}</p>
{{ plots(suite.plots) }}
<details><summary>as a table</summary>{{ grid(suite.table) }}</details>
{% else %}<p class="note">Not measured: <code>findrec evaluate {{ name }} --suite noise --suite missing
--suite length</code>.</p>{% endfor %}

<h2 id="serving">Serving</h2>
{% if serving %}{{ plots(serving) }}
{% else %}<p class="note">No index was measured (<code>findrec index {{ name }}</code>).</p>{% endif %}

<h2 id="sample-recommendations">Sample recommendations</h2>
{% for sample in samples %}<article>
<h3>user {{ sample.user }}</h3>
<div class="columns">
<div><p class="note">last events, oldest first</p><ul>
{% for one in sample.history %}<li>{{ item(one) }}</li>{% endfor %}</ul></div>
<div><p class="note">what came next</p><ul>
{% for one in sample.target %}<li>{{ item(one) }}</li>{% endfor %}</ul></div>
<div><p class="note">recommended</p><ol>
{% for one in sample.recommended %}
<li{% if one.item in sample.target|map(attribute="item")|list %} class="hit"{% endif %}>{{ item(one) }}
<span class="soft">{{ "%.2f"|format(one.score) }}</span></li>{% endfor %}</ol></div>
</div></article>
{% else %}<p class="note">None drawn.</p>{% endfor %}

<h2 id="environment">Environment</h2>
<dl>{% for what, value in environment %}<dt>{{ what }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>

<h2 id="configuration">Configuration</h2>
<pre>{{ config }}</pre>
{% endblock %}
"""
