// Draws a picture and the part of it that the model looked at, with the evidence of each cell.
"use strict";

// Pixels of a canvas.
const LONGEST_SIDE = 960;
const SMALL_SIDE = 224;
const CROP_SIDE = 448;
const STRONG = 4; // calibrated logit that is drawn as strongly as it gets: a probability of 98 %
const STRONGEST = 0.6; // opacity; what is below stays to be seen

/** The centre crop of a picture, as the runtime takes it: negative offsets where the picture is smaller. */
function cropOf(width, height, input) {
  const offset = (size, wanted) =>
    size >= wanted ? Math.floor((size - wanted) / 2) : -Math.floor((wanted - size) / 2);
  return { left: offset(width, input.width), top: offset(height, input.height), ...input };
}

/** The size at which a whole picture is drawn, and its scale. */
function shownSize(width, height) {
  const longest = Math.max(width, height);
  const scale = longest < SMALL_SIDE ? Math.floor(SMALL_SIDE / longest) : Math.min(1, LONGEST_SIDE / longest);
  return { scale, width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
}

function drawWhole(canvas, { whole, crop, scale }, evidence, colours) {
  canvas.width = whole.width;
  canvas.height = whole.height;
  const pen = canvas.getContext("2d");
  pen.drawImage(whole, 0, 0);
  const box = [crop.left * scale, crop.top * scale, crop.width * scale, crop.height * scale];
  if (evidence !== null) drawCells(pen, ...box, evidence, colours);
  pen.lineWidth = Math.max(2, canvas.width / 200);
  pen.strokeStyle = colours.frame;
  const [left, top] = [Math.max(0, box[0]), Math.max(0, box[1])];
  pen.strokeRect(left, top, Math.min(whole.width - left, box[2]), Math.min(whole.height - top, box[3]));
}

/** Where a picture lies along one side of its crop, mirrored outwards as often as it takes, its border included. */
function placesOf(offset, size, wanted) {
  const places = [];
  for (let turn = -Math.ceil(offset / size); offset + turn * size < wanted; turn++) {
    places.push({ start: offset + turn * size, mirrored: turn % 2 !== 0 });
  }
  return places;
}

function drawCrop(canvas, { part, crop }, evidence, colours) {
  const scale = Math.max(1, Math.floor(CROP_SIDE / crop.width));
  canvas.width = crop.width * scale;
  canvas.height = crop.height * scale;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  for (const row of placesOf(Math.max(0, -crop.top), part.height, crop.height)) {
    for (const column of placesOf(Math.max(0, -crop.left), part.width, crop.width)) {
      const [left, top] = [column.start + column.mirrored * part.width, row.start + row.mirrored * part.height];
      pen.setTransform(column.mirrored ? -scale : scale, 0, 0, row.mirrored ? -scale : scale, left * scale, top * scale);
      pen.drawImage(part, 0, 0);
    }
  }
  pen.resetTransform();
  if (evidence !== null) drawCells(pen, 0, 0, canvas.width, canvas.height, evidence, colours);
}

function drawCells(pen, left, top, width, height, evidence, colours) {
  const cellHeight = height / evidence.length;
  evidence.forEach((row, y) => {
    const cellWidth = width / row.length;
    row.forEach((logit, x) => {
      pen.globalAlpha = STRONGEST * Math.min(1, Math.abs(logit) / STRONG);
      pen.fillStyle = logit > 0 ? colours.fake : colours.real;
      pen.fillRect(left + x * cellWidth, top + y * cellHeight, cellWidth, cellHeight);
    });
  });
  pen.globalAlpha = 1;
}

/** What the map shows, in words, for whoever cannot see it. */
function describeEvidence(evidence) {
  const cells = evidence.flat();
  const fake = cells.filter((logit) => logit > 0).length;
  return `Evidence: ${fake} of ${cells.length} cells point to generated, ${cells.length - fake} to natural.`;
}
