"""The page of `findrec.evaluation.report`: one file, no scripts, nothing fetched, light and dark."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ name }} · FindRec report</title>
<style>
:root { --paper: #fdfdfb; --ink: #1d2329; --soft: #626b75; --line: #dcdfe3; --tint: #f1f3f2;
        --mark: #0b6e69; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15191d; --ink: #e4e7ea; --soft: #9aa4ae; --line: #323940; --tint: #1e2429;
          --mark: #55c2b8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
       color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; border-bottom: 1px solid var(--line); }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
p.note, figcaption, .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.best { color: var(--mark); font-weight: 650; }
td small { color: var(--soft); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.25rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; }
article { margin: 1rem 0; padding: 1rem 1.2rem; background: var(--tint); border-radius: .5rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1.5rem; }
ol, ul { margin: 0; padding-left: 1.4rem; } li { overflow-wrap: anywhere; }
li.hit { color: var(--mark); font-weight: 650; }
pre { padding: 1rem; background: var(--tint); border-radius: .5rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; color: var(--soft); }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p class="soft">{{ data.recipe }}: {{ "{:,}".format(data.num_users) }} users,
{{ "{:,}".format(data.num_items) }} items, {{ "{:,}".format(data.num_events) }} events,
longest history {{ "{:,}".format(data.longest) }}; {{ "%.1f"|format(100 * data.repeat_rate) }} % of the
training events repeat an item,
{{ "%.1f"|format(100 * data.tied_last_rate) }} % of the users have a tied last timestamp.</p>

<h2>Results</h2>
{% for table in tables %}
<h3>{{ table.split }}</h3>
{% for line in table.protocols %}<p class="note">{{ line }}</p>{% endfor %}
<div class="scroll"><table class="wide">
<tr><th>model</th>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr><td>{{ row.model }}</td>
{% for cell in row.cells %}<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}
{% if cell.error %}<small>± {{ cell.error }}</small>{% endif %}</td>
{% endfor %}</tr>{% endfor %}
</table></div>
{% else %}<p class="note">Not evaluated yet.</p>{% endfor %}
{% if tables %}<p class="note">± is the standard error over users; differences below about twice
that are noise. A coloured number is the largest (mean rank: the smallest) of its column.</p>{% endif %}
{% if strata %}<details><summary>Parts of the test cases</summary><div class="scroll"><table>
<tr>{% for column in strata.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in strata.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></div></details>{% endif %}

<h2>Training</h2>
{% if curves %}<div class="curves">{% for curve in curves %}
<figure><img alt="{{ curve.title }}" src="data:image/svg+xml;base64,{{ curve.svg }}">
<figcaption>{{ curve.title }}{% if curve.last %}: last {{ curve.last }}{% endif %}</figcaption></figure>
{% endfor %}</div>{% else %}<p class="note">No logged values.</p>{% endif %}

<h2>Sample recommendations</h2>
{% for sample in samples %}<article>
<h3>user {{ sample.user }}</h3>
<div class="columns">
<div><p class="note">last events, oldest first</p><ul>
{% for text in sample.history %}<li>{{ text }}</li>{% endfor %}</ul></div>
<div><p class="note">what came next</p><ul>
{% for text in sample.target %}<li>{{ text }}</li>{% endfor %}</ul></div>
<div><p class="note">recommended</p><ol>
{% for text, score in sample.recommended %}<li{% if text in sample.target %} class="hit"{% endif %}>{{ text }}
<span class="soft">{{ "%.2f"|format(score) }}</span></li>{% endfor %}</ol></div>
</div></article>
{% else %}<p class="note">None drawn.</p>{% endfor %}

<h2>Configuration</h2>
<pre>{{ config }}</pre>
</body>
</html>
"""
