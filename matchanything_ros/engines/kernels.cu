// Preprocessing on the GPU: an 8-bit image, uploaded once, -> float planes of the network's input.
// Every interpolation is separable and linear: a table per axis (first source pixel, weights [taps, target]) is all that
// differs between them. kernels.ptx is made from this file; see test_kernels.py for how.

__device__ static float rounded(float value) {
  value += 0.5f;
  return value < 0.0f ? 0.0f : value > 255.0f ? 255.0f : (float)(int)value;
}

// uint8 [source_height, source_width, channels] -> float [source_height, width, planes], values / 255.
// planes: 1 when the image has one channel or `luma` asks for ITU-R 601 gray, else 3.
// luma: 1 for gray in floating point; 2 as PIL does: gray in its integer arithmetic, sums rounded to 8 bits.
extern "C" __global__ void resize_rows(const unsigned char* image, int source_height, int source_width, int channels,
                                       int luma, const int* first, const float* weights, int taps, int width,
                                       float* out) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= width || y >= source_height) return;
  const unsigned char* row = image + (long long)y * source_width * channels;
  float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f;
  for (int tap = 0; tap < taps; ++tap) {
    const float weight = weights[tap * width + x];
    int column = first[x] + tap;
    if (column > source_width - 1) column = source_width - 1;  // weight is 0 there
    const unsigned char* pixel = row + column * channels;
    if (channels == 1) {
      sum0 += weight * pixel[0];
    } else if (luma == 2) {
      sum0 += weight * ((19595 * pixel[0] + 38470 * pixel[1] + 7471 * pixel[2] + 32768) >> 16);
    } else if (luma) {
      sum0 += weight * (0.299f * pixel[0] + 0.587f * pixel[1] + 0.114f * pixel[2]);
    } else {
      sum0 += weight * pixel[0];
      sum1 += weight * pixel[1];
      sum2 += weight * pixel[2];
    }
  }
  if (luma == 2) sum0 = rounded(sum0);
  const float scale = 1.0f / 255.0f;
  if (channels == 1 || luma) {
    out[(long long)y * width + x] = sum0 * scale;
  } else {
    float* pixel = out + ((long long)y * width + x) * 3;
    pixel[0] = sum0 * scale;
    pixel[1] = sum1 * scale;
    pixel[2] = sum2 * scale;
  }
}

__device__ static int truncated(float value) {
  value *= 255.0f;
  return value < 0.0f ? 0 : value > 255.0f ? 255 : (int)value;
}

// float [source_height, width, planes] -> float [out_planes, out_height, out_width]; zero outside of [height, width].
// pil: 1 to truncate to 8 bits and take luma in PIL's integer arithmetic (out_planes 1); 2 to round to 8 bits.
extern "C" __global__ void resize_columns(const float* rows, int source_height, int width, int planes,
                                          const int* first, const float* weights, int taps, int height, int pil,
                                          int out_planes, int out_height, int out_width, float* out) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= out_width || y >= out_height) return;
  float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f;
  if (x < width && y < height) {
    for (int tap = 0; tap < taps; ++tap) {
      const float weight = weights[tap * height + y];
      int line = first[y] + tap;
      if (line > source_height - 1) line = source_height - 1;  // weight is 0 there
      const float* pixel = rows + ((long long)line * width + x) * planes;
      sum0 += weight * pixel[0];
      if (planes == 3) {
        sum1 += weight * pixel[1];
        sum2 += weight * pixel[2];
      }
    }
    if (pil == 2) {
      sum0 = rounded(sum0 * 255.0f) / 255.0f;
    } else if (pil) {
      int gray = truncated(sum0);
      if (planes == 3) gray = (19595 * gray + 38470 * truncated(sum1) + 7471 * truncated(sum2) + 32768) >> 16;
      sum0 = gray / 255.0f;
    } else if (planes == 1) {
      sum1 = sum2 = sum0;
    }
  }
  const long long plane = (long long)out_height * out_width, pixel = (long long)y * out_width + x;
  out[pixel] = sum0;
  if (out_planes == 3) {
    out[plane + pixel] = sum1;
    out[2 * plane + pixel] = sum2;
  }
}
