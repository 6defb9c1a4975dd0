/** Pictures as an app has them: pixels, a file, or what a canvas takes. */
import { ImageError, oneLine } from "./errors.js";
import { MAX_PIXELS, type RGB } from "./image.js";

/** RGB or RGBA pixels, the bytes of a picture file, or anything that `createImageBitmap` takes. */
export type Source = RGB | ImageData | Blob | Uint8Array | ArrayBuffer | ImageBitmapSource;

/**
 * The picture as upright 8-bit RGB; transparency is laid over white. Files are decoded by the browser, whose JPEG
 * decoder may round otherwise than Pillow's. Throws ImageError for what is not a picture.
 */
export async function openPicture(source: Source): Promise<RGB> {
  if (isPixels(source)) return opaque(source);
  const file = source instanceof Uint8Array || source instanceof ArrayBuffer ? new Blob([source as BlobPart]) : source;
  if (typeof createImageBitmap !== "function") {
    throw new ImageError("no pictures can be decoded here: give RGB pixels as { width, height, data }");
  }
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file as ImageBitmapSource, {
      imageOrientation: "from-image",
      premultiplyAlpha: "none",
      colorSpaceConversion: "none",
    });
  } catch (error) {
    throw new ImageError(`the image cannot be decoded (${oneLine(error)}): is it a whole PNG, JPEG, WebP or GIF?`);
  }
  const { width, height } = bitmap;
  try {
    checkSize(width, height);
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    if (!context) throw new ImageError(`a picture of ${width} × ${height} pixels cannot be read: scale it down`);
    context.drawImage(bitmap, 0, 0);
    return opaque(context.getImageData(0, 0, width, height));
  } finally {
    bitmap.close();
  }
}

function isPixels(source: Source): source is RGB {
  const { data, width, height } = source as Partial<RGB>;
  return (data instanceof Uint8Array || data instanceof Uint8ClampedArray) && Boolean(width) && Boolean(height);
}

function checkSize(width: number, height: number): void {
  if (width * height > MAX_PIXELS) {
    throw new ImageError(
      `the image has ${width} × ${height} pixels, at most ${MAX_PIXELS} are allowed: scale it down first`,
    );
  }
}

/** Three bytes a pixel of three or four, laid over white as Pillow's alpha_composite rounds. */
function opaque({ width, height, data }: RGB): RGB {
  checkSize(width, height);
  const pixels = width * height;
  if (data.length === pixels * 3) return { width, height, data };
  if (data.length !== pixels * 4) {
    throw new ImageError(
      `pixels of ${width} × ${height} are ${pixels * 3} bytes of RGB or ${pixels * 4} of RGBA, not ${data.length}`,
    );
  }
  const out = new Uint8ClampedArray(pixels * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    const alpha = data[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const value = data[from + channel];
      out[to++] = alpha === 255 ? value : Math.round((value * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return { width, height, data: out };
}
