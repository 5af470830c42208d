"""The report's page: a Jinja template in which everything is inline, so that the file can be mailed as it is."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} – pfc report</title>
<style>
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --line: #dde1e6; --right: #1a7f4b; --wrong: #b3261e;
        --paper: #fff; --code: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa4af; --line: #363c44; --right: #4cc38a; --wrong: #ff8379; --paper: #14171b;
          --code: #1c2127; }
  .figures img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 64px; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 19px; margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; }
.figures figure { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.figures figcaption { font-weight: 600; margin-bottom: 4px; }
.figures img { width: 100%; display: block; }
.scroll { overflow-x: auto; margin-bottom: 18px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: 13px; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
tr.soft td { color: var(--soft); }
.pairs { display: flex; flex-wrap: wrap; gap: 14px; }
.pairs img { height: 76px; border-radius: 3px; border: 1px solid var(--line); }
.pairs figcaption { font-size: 13px; font-variant-numeric: tabular-nums; }
.right { color: var(--right); } .wrong { color: var(--wrong); font-weight: 600; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
      font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { .figures figure, .pairs figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<div class="soft">{{ subtitle }}</div>
<div class="tiles">
{%- for tile in tiles %}
<div class="tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span></div>
{%- endfor %}
</div>

{%- if config %}
<h2>Training</h2>
{%- if curves %}
<div class="figures">
{%- for figure in curves %}
<figure><figcaption>{{ figure.title }}</figcaption><img src="{{ figure.uri }}" alt="{{ figure.title }}"></figure>
{%- endfor %}
</div>
{%- else %}
<p class="soft">Nothing has been logged yet.</p>
{%- endif %}

<h2>Verification</h2>
{%- if table %}
<p class="soft">Two images are taken for one identity where the cosine of their embeddings reaches a threshold.
Accuracy: 10 folds, each judged with the threshold that is best on the other nine; ± is the standard deviation over
the folds. With flip: the embedding of the mirror image is added to the image's own.</p>
<div class="scroll"><table>
<tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr>
{%- for row in table.rows %}
<tr{% if row.untrained %} class="soft"{% endif %}>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- elif not sets %}
<p class="soft">Nothing has been evaluated yet.</p>
{%- endif %}
{%- endif %}

{%- for set in sets %}
<h2>{{ set.name }}{% if set.step is not none %}, step {{ "{:,}".format(set.step) }}{% endif %}</h2>
{%- if set.rows %}
<p class="soft">{{ set.about }}</p>
<div class="scroll"><table>
<tr>{% for head in set.rows[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{%- for row in set.rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table></div>
{%- endif %}
<div class="figures">
{%- for figure in set.figures %}
<figure><figcaption>{{ figure.title }}</figcaption><img src="{{ figure.uri }}" alt="{{ figure.title }}"></figure>
{%- endfor %}
</div>
{%- if set.note %}
<p class="soft">{{ set.note }}</p>
{%- endif %}
{%- for group in set.groups %}
<h3>{{ group.title }}</h3>
<div class="pairs">
{%- for pair in group.pairs %}
<figure>{% for image in pair.images %}<img src="{{ image }}" alt="image {{ loop.index }}"> {% endfor %}
<figcaption>{{ pair.told }}
{%- if pair.right is not none %}
<span class="{{ 'right' if pair.right else 'wrong' }}">{{ "✓ right" if pair.right else "✗ wrong" }}</span>
{%- endif %}</figcaption>
</figure>
{%- endfor %}
</div>
{%- endfor %}
{%- endfor %}

{%- if config %}

<h2>Configuration</h2>
<pre>{{ config }}</pre>
{%- endif %}
</body>
</html>
"""
