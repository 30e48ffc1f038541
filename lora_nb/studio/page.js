/* What the studio's page does by itself (chapter `studio.bridge`): keys, dropped files, and painting a mask. It hands results to
   Python as the text of a hidden field, so it needs no widget of its own. `img` is the element that started it. */
(function boot(img, tries) {
  const root = img.closest(".ls");
  if (!root) { if (tries < 100) setTimeout(() => boot(img, tries + 1), 100); return; }
  if (root.lsReady) return;
  root.lsReady = true;
  const fire = (el, kind) => el.dispatchEvent(new Event(kind, {bubbles: true}));
  const commit = el => { if (el && /INPUT|TEXTAREA/.test(el.tagName)) { fire(el, "input"); fire(el, "change"); } };
  const send = (from, message) => {
    const wire = from.closest(".ls-bridge").querySelector(".ls-wire textarea");
    wire.value = JSON.stringify(message); commit(wire);
  };
  const visible = el => el.offsetParent !== null;

  root.addEventListener("keydown", e => {
    const enter = e.key === "Enter" && !e.isComposing;
    if (enter && (e.ctrlKey || e.metaKey)) {
      const go = [...root.querySelectorAll("button.ls-go")].find(b => visible(b) && !b.disabled);
      if (go) { e.preventDefault(); e.stopPropagation(); commit(e.target); setTimeout(() => go.click(), 30); }
    } else if (enter && e.target.closest(".ls-enter") && e.target.tagName === "INPUT") {
      const add = e.target.closest(".ls-enter").querySelector("button");
      if (add && !add.disabled) { e.preventDefault(); commit(e.target); setTimeout(() => add.click(), 30); }
    }
  }, true);

  const read = file => new Promise((done, fail) => {
    const r = new FileReader();
    r.onload = () => done({name: file.name, data: r.result.slice(r.result.indexOf(",") + 1)});
    r.onerror = () => fail(r.error);
    r.readAsDataURL(file);
  });
  const take = async (zone, files) => {
    files = [...files];
    const most = Number(zone.dataset.most), size = files.reduce((n, f) => n + f.size, 0);
    if (!files.length) return;
    if (size > most) return send(zone, {large: files.map(f => f.name), size, most});
    zone.classList.add("ls-busy");
    try { send(zone, {files: await Promise.all(files.map(read))}); }
    catch (e) { send(zone, {failed: String(e)}); }
    finally { zone.classList.remove("ls-busy"); }
  };
  const zoneOf = e => e.target.closest && e.target.closest(".ls-drop");
  for (const kind of ["dragover", "dragenter"]) root.addEventListener(kind, e => {
    const zone = zoneOf(e);
    if (zone) { e.preventDefault(); e.stopPropagation(); zone.classList.add("ls-over"); }
  }, true);
  root.addEventListener("dragleave", e => { const zone = zoneOf(e); if (zone) zone.classList.remove("ls-over"); }, true);
  root.addEventListener("drop", e => {
    const zone = zoneOf(e);
    if (zone) { e.preventDefault(); e.stopPropagation(); zone.classList.remove("ls-over"); take(zone, e.dataTransfer.files); }
  }, true);
  root.addEventListener("change", e => {
    if (e.target.type === "file" && zoneOf(e)) { take(zoneOf(e), e.target.files); e.target.value = ""; }
  }, true);

  let last = null;
  const place = (c, e) => {
    const r = c.getBoundingClientRect();
    return [(e.clientX - r.left) * c.width / r.width, (e.clientY - r.top) * c.height / r.height];
  };
  const stroke = (c, to) => {
    const box = c.closest(".ls-bridge"), pen = c.getContext("2d");
    pen.globalCompositeOperation = box.querySelector(".ls-erase").checked ? "destination-out" : "source-over";
    pen.lineWidth = box.querySelector(".ls-brush").value * Math.max(c.width, c.height) / 100;
    pen.lineCap = pen.lineJoin = "round"; pen.strokeStyle = "#d55e00";
    pen.beginPath(); pen.moveTo(...last); pen.lineTo(...to); pen.stroke();
    last = to;
  };
  root.addEventListener("pointerdown", e => {
    if (!e.target.matches("canvas.ls-canvas")) return;
    e.preventDefault(); e.target.setPointerCapture(e.pointerId);
    last = place(e.target, e); stroke(e.target, [last[0] + .01, last[1]]);
  });
  root.addEventListener("pointermove", e => { if (last && e.target.matches("canvas.ls-canvas")) stroke(e.target, place(e.target, e)); });
  for (const kind of ["pointerup", "pointercancel"]) root.addEventListener(kind, e => {
    if (last && e.target.matches("canvas.ls-canvas")) { last = null; send(e.target, {mask: e.target.toDataURL("image/png")}); }
  });
  root.addEventListener("click", e => {
    const b = e.target.closest && e.target.closest("[data-clear]");
    if (!b) return;
    const c = b.closest(".ls-bridge").querySelector("canvas.ls-canvas");
    c.getContext("2d").clearRect(0, 0, c.width, c.height); send(c, {mask: ""});
  });
})(this, 0);
