// SPDX-License-Identifier: Apache-2.0
// What a preview says of a picture's places, shown on the picture: kept ones clear, the others
// dimmed, and where each has gone.

const RED = "#d1242f", GREEN = "#1a7f37", PURPLE = "#8250df";
const WIDEST = 640; // pixels that are drawn

/** The place of a stage, in words. */
export function behind({ where, layer }) {
  return {
    input: "scaled down before the tower",
    tower: `after layer ${layer} of the tower`,
    output: "after the tower",
    decoder: `from layer ${layer} of the decoder on`,
  }[where];
}

/**
 * A picture in all of its grids, at one of the stages: from 0, where nothing has left, to the last.
 * Without a preview, the picture as it is.
 */
export class Kept {
  constructor(bitmap, preview, views, caption) {
    this.caption = caption;
    this.note = preview?.note ?? "";
    this.newlines = preview?.newlines ?? null;
    this.stages = preview?.stages ?? [];
    this.tokens = preview?.reduction.visual_tokens_before;
    const grids = preview?.grids ?? [{ first: 0, rows: 0, columns: 0, area: [0, 0, 1, 1] }];
    const places = grids.reduce((sum, grid) => sum + grid.rows * grid.columns, this.newlines?.count ?? 0);
    // Behind every stage: where the token of a place is (there, in the place that took it in, or
    // nowhere), and which places are left. Padding of tiles is in none.
    this.ends = [Array.from({ length: places }, (_, place) => place)];
    const [first] = this.stages;
    this.left = [new Set(first ? [...first.kept, ...first.left] : preview?.kept)];
    for (const { kept, left, into } of this.stages) {
      const goes = new Map(left.map((place, i) => [place, into ? into[i] : null]));
      this.ends.push(this.ends.at(-1).map((end) => (goes.has(end) ? goes.get(end) : end)));
      this.left.push(new Set(kept));
    }
    this.views = grids.map((grid) => new View(grid, this, bitmap));
    views.replaceChildren(...this.views.map((view) => view.canvas));
    this.at(this.stages.length);
  }

  at(stage) {
    this.stage = stage;
    this.follow(null);
  }

  keeps(place) { return this.left[this.stage].has(place); }

  /** Show where a place has gone; without one, all that is left. */
  follow(place) {
    this.followed = place;
    if (this.tokens !== undefined) this.caption.textContent = place === null ? this.summary() : this.sentence(place);
    this.views.forEach((view) => view.draw());
  }

  summary() {
    const kept = this.left[this.stage];
    if (!this.stages.length) return `All ${this.tokens} tokens stay.`;
    const where = this.stage ? behind(this.stages[this.stage - 1]) : "before any leave";
    const words = [`${kept.size} of ${this.tokens} tokens ${where}`];
    if (this.newlines) {
      const { first, count } = this.newlines;
      words.push(`${[...kept].filter((place) => place >= first).length} of ${count} newlines among them`);
    }
    return `${words.join(", ")}.${this.note && ` ${this.note}.`}`;
  }

  sentence(place) {
    const name = this.name(place), end = this.ends[this.stage][place];
    if (end === place && !this.keeps(place)) return `${name}: padding, which the model does not see.`;
    if (end === place) {
      const others = this.sources(place).length;
      return `${name}: kept${others ? `, and took in ${others} other${others > 1 ? "s" : ""}` : ""}.`;
    }
    if (end !== null) return `${name}: merged into ${this.name(end).toLowerCase()}.`;
    const gone = this.ends.findIndex((ends) => ends[place] === null);
    return `${name}: gone ${behind(this.stages[gone - 1])}.`;
  }

  /** The places whose tokens are in this one. */
  sources(place) {
    const ends = this.ends[this.stage];
    return [...ends.keys()].filter((source) => ends[source] === place && source !== place);
  }

  name(place) {
    const view = this.views.find((one) => one.has(place));
    if (!view) return `Newline ${place - this.newlines.first + 1}`;
    const [row, column] = view.spot(place);
    return `Row ${row + 1}, column ${column + 1}${this.views.length > 1 ? ` of the ${view.grid.name}` : ""}`;
  }
}

/** One grid, over the whole picture: the thumbnail's, the tiles', or the only one. */
class View {
  constructor(grid, kept, bitmap) {
    Object.assign(this, { grid, kept, bitmap, cursor: null });
    const { width, height } = bitmap;
    const scale = WIDEST / Math.max(width, height);
    this.canvas = document.createElement("canvas");
    this.canvas.width = Math.max(1, Math.round(width * scale));
    this.canvas.height = Math.max(1, Math.round(height * scale));
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "The picture");
    if (!grid.rows) return;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", `The ${grid.name}, what is left of it; arrow keys go from place to place`);
    this.canvas.tabIndex = 0;
    this.canvas.onpointermove = this.canvas.onpointerdown = (event) => this.point(event);
    this.canvas.onpointerleave = this.canvas.onblur = () => kept.follow(null);
    this.canvas.onkeydown = (event) => this.step(event);
  }

  has(place) { return place >= this.grid.first && place < this.grid.first + this.grid.rows * this.grid.columns; }

  spot(place) {
    const number = place - this.grid.first;
    return [Math.floor(number / this.grid.columns), number % this.grid.columns];
  }

  /** Left, top, width and height of a place, in whole pixels so that neighbours meet. */
  box(place) {
    const { rows, columns, area: [x0, y0, x1, y1] } = this.grid;
    const [row, column] = this.spot(place);
    const x = (at) => Math.round(this.canvas.width * (x0 + ((x1 - x0) * at) / columns));
    const y = (at) => Math.round(this.canvas.height * (y0 + ((y1 - y0) * at) / rows));
    return [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)];
  }

  point({ offsetX, offsetY }) {
    const { rows, columns, area: [x0, y0, x1, y1] } = this.grid;
    const across = (offsetX / this.canvas.clientWidth - x0) / (x1 - x0);
    const down = (offsetY / this.canvas.clientHeight - y0) / (y1 - y0);
    const inside = across >= 0 && across < 1 && down >= 0 && down < 1;
    if (inside) this.go(Math.floor(down * rows), Math.floor(across * columns));
    else this.kept.follow(null);
  }

  step(event) {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    const { rows, columns } = this.grid;
    const [row, column] = this.cursor ?? [-by[0], -by[1]]; // the first step goes to the corner
    this.go((row + by[0] + rows) % rows, (column + by[1] + columns) % columns);
  }

  go(row, column) {
    this.cursor = [row, column];
    this.kept.follow(this.grid.first + row * this.grid.columns + column);
  }

  draw() {
    const { canvas, grid, kept } = this;
    const pen = canvas.getContext("2d");
    pen.drawImage(this.bitmap, 0, 0, canvas.width, canvas.height);
    if (!grid.rows) return;
    const veil = new Path2D();
    veil.rect(0, 0, canvas.width, canvas.height);
    for (let place = grid.first; this.has(place); place += 1) {
      if (kept.keeps(place)) veil.rect(...this.box(place));
    }
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--veil");
    pen.fill(veil, "evenodd");
    const place = kept.followed;
    if (place === null) return;
    const end = kept.ends[kept.stage][place];
    if (end === null || !kept.keeps(end)) {
      this.mark(pen, place, RED);
      return;
    }
    for (const source of kept.sources(end)) {
      this.mark(pen, source, source === place ? RED : PURPLE);
      this.line(pen, source, end);
    }
    this.mark(pen, end, GREEN);
  }

  mark(pen, place, colour) {
    if (this.has(place)) twice(pen, 3, colour, () => pen.strokeRect(...this.box(place)));
  }

  line(pen, from, to) {
    if (!this.has(from) || !this.has(to)) return;
    const [start, end] = [from, to].map((place) => {
      const [left, top, width, height] = this.box(place);
      return [left + width / 2, top + height / 2];
    });
    twice(pen, 3, PURPLE, () => {
      pen.beginPath();
      pen.moveTo(...start);
      pen.lineTo(...end);
      pen.stroke();
    });
  }
}

/** Draw with a white rim, to be seen on any picture. */
function twice(pen, width, colour, stroke) {
  for (const [lineWidth, strokeStyle] of [[width + 3, "#fff"], [width, colour]]) {
    Object.assign(pen, { lineWidth, strokeStyle, lineCap: "round" });
    stroke();
  }
}
