// Pictures of the next question: read, told from other files by their first bytes, shown in the tray.

const ALLOWED = "PNG, JPEG, WebP, GIF, BMP or TIFF";
const NOT_SHOWN = "image/tiff"; // the server reads it, browsers mostly do not

/** The media type by the first bytes, or null. */
function typeOf(bytes) {
  const text = String.fromCharCode(...bytes.subarray(0, 12));
  if (text.startsWith("\x89PNG\r\n\x1a\n")) return "image/png";
  if (text.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (text.startsWith("GIF87a") || text.startsWith("GIF89a")) return "image/gif";
  if (text.startsWith("RIFF") && text.slice(8) === "WEBP") return "image/webp";
  if (text.startsWith("BM")) return "image/bmp";
  if (text.startsWith("II*\0") || text.startsWith("MM\0*")) return NOT_SHOWN;
  return null;
}

/** A file as a picture {name, url (data:), preview (blob:), width, height}. Throws an Error with one line. */
export async function readPicture(file) {
  const name = file.name || "pasted picture";
  const bytes = await file.arrayBuffer().catch(() => null);
  if (bytes === null) throw new Error(`${name} cannot be read: choose a file.`);
  const type = typeOf(new Uint8Array(bytes));
  if (type === null) throw new Error(`${name} is not a picture: ${ALLOWED} are.`);
  const blob = new Blob([bytes], { type });
  const preview = URL.createObjectURL(blob);
  const image = new Image();
  image.src = preview;
  try {
    await image.decode();
  } catch {
    if (type !== NOT_SHOWN) {
      URL.revokeObjectURL(preview);
      throw new Error(`${name} cannot be decoded: is the file complete?`);
    }
  }
  return { name, url: await dataUrl(blob), preview, width: image.naturalWidth, height: image.naturalHeight };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** An <img> of a picture; its text names it for who does not see it. */
export function figure(picture, number) {
  const image = document.createElement("img");
  image.src = picture.preview;
  const size = picture.width ? `, ${picture.width} × ${picture.height} pixels` : "";
  image.alt = `Picture ${number}: ${picture.name}${size}`;
  image.classList.toggle("tiny", picture.width > 0 && picture.width <= 128);
  image.title = `${picture.name}${size}`;
  return image;
}

/** The tray of waiting pictures: `add(files)`, `take()`; `told(text)` and `wrong(text)` say what happened. */
export function tray(element, told, wrong) {
  let waiting = [];

  function show() {
    element.replaceChildren(
      ...waiting.map((picture, i) => {
        const item = document.createElement("div");
        item.setAttribute("role", "listitem");
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "×";
        remove.setAttribute("aria-label", `Remove ${picture.name}`);
        remove.onclick = () => {
          URL.revokeObjectURL(picture.preview);
          waiting = waiting.filter((other) => other !== picture);
          show();
          told(`${picture.name} removed`);
          const next = element.querySelectorAll("button")[Math.min(i, waiting.length - 1)];
          (next ?? document.getElementById("question")).focus();
        };
        item.append(figure(picture, i + 1), remove);
        return item;
      }),
    );
  }

  return {
    async add(files) {
      wrong("");
      const problems = [];
      for (const file of files) {
        try {
          const picture = await readPicture(file);
          waiting.push(picture);
          told(`${picture.name} added`);
        } catch (error) {
          problems.push(error.message);
        }
      }
      show();
      if (problems.length) wrong(problems.join(" "));
    },
    take() {
      const taken = waiting;
      waiting = [];
      show();
      return taken;
    },
    clear() {
      for (const picture of this.take()) URL.revokeObjectURL(picture.preview);
    },
    get empty() {
      return waiting.length === 0;
    },
  };
}

/** Files that are dropped anywhere or pasted go to `add`; text is left to the field it is meant for. */
export function dropAndPaste(add) {
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const over = (event, on) => {
    if (!files(event)) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", on);
  };
  addEventListener("dragenter", (event) => over(event, true));
  addEventListener("dragover", (event) => over(event, true));
  addEventListener("dragleave", (event) => event.relatedTarget === null && over(event, false));
  addEventListener("drop", (event) => {
    over(event, false);
    if (files(event)) add([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])];
    if (!pasted.length) return;
    event.preventDefault();
    add(pasted);
  });
}
