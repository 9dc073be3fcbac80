// Graphs as PyTorch compiles them ahead of time, written by hand: what a test needs of a package, without PyTorch.
// GRAPH says which one (below); FAULT, for the first phase of each package, what is wrong with it.
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

// The part of libtorch's C interface that compiled graphs use.
extern int32_t aoti_torch_get_data_ptr(void* tensor, void** data);
extern int32_t aoti_torch_empty_strided(
    int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t kind, int32_t device, int32_t index, void** tensor);
extern int32_t aoti_torch_delete_tensor_object(void* tensor);

enum { FLOAT = 6, DOUBLE = 7 };
enum { NONE, FAILS, HANGS, NAN_GRADIENT, FORGETS, WRONG_SHAPE, WRONG_KIND, FAILS_LATER };
enum { PIXELS = 28 * 28, CLASSES = 10, LATENT = 4, BATCH = 4, DRAWN = 20 };

static void* at(void* tensor) {
  void* data = 0;
  aoti_torch_get_data_ptr(tensor, &data);
  return data;
}

static void* new_tensor(int64_t rows, int64_t columns, int64_t dims, int32_t kind, void** tensor) {
  const int64_t sizes[] = {dims == 1 ? columns : rows, columns}, strides[] = {dims == 1 ? 1 : columns, 1};
  aoti_torch_empty_strided(dims, sizes, strides, kind, 0, 0, tensor);
  void* data = at(*tensor);
  memset(data, 0, (kind == FLOAT ? 4 : 8) * (dims ? (dims == 1 ? columns : rows * columns) : 1));
  return data;
}

static void scalar(void** tensor, float value) { *(float*)new_tensor(1, 1, 0, FLOAT, tensor) = value; }

#if GRAPH == 0
// A linear classifier: (w, bias, mean, images, classes, mask, step) to (d w, d bias, d mean, loss, correct).
// The loss is half the squared distance to the one-hot class; a mask blanks pixels; `mean` follows the images.
enum { OUTPUTS = 5 };
static int run(void** in, void** out) {
  const float *w = at(in[0]), *bias = at(in[1]), *mean = at(in[2]), *images = at(in[3]), *mask = at(in[5]);
  const int64_t* classes = at(in[4]);
  (void)at(in[6]);
  float* dw = new_tensor(FAULT == WRONG_SHAPE ? CLASSES + 1 : CLASSES, PIXELS, 2, FLOAT, &out[0]);
  float* dbias = new_tensor(1, CLASSES, 1, FAULT == WRONG_KIND ? DOUBLE : FLOAT, &out[1]);
  float* dmean = new_tensor(1, PIXELS, 1, FLOAT, &out[2]);
  float loss = 0, correct = 0;
  for (int b = 0; b < BATCH; b++) {
    const float *x = images + b * PIXELS, *m = mask + b * PIXELS;
    int best = 0;
    float top = -INFINITY;
    for (int c = 0; c < CLASSES; c++) {
      float y = bias[c];
      for (int p = 0; p < PIXELS; p++) y += w[c * PIXELS + p] * (x[p] - mean[p]) * m[p];
      if (y > top) top = y, best = c;
      const float e = y - (classes[b] == c);
      loss += 0.5f * e * e;
      dbias[c] += e;
      for (int p = 0; p < PIXELS; p++) dw[c * PIXELS + p] += e * (x[p] - mean[p]) * m[p];
    }
    correct += best == classes[b];
    for (int p = 0; p < PIXELS; p++) dmean[p] += 0.1f / BATCH * (x[p] - mean[p]);
  }
  static int runs = 0;
  if (FAULT == NAN_GRADIENT) dw[7] = NAN;
  if (FAULT == FORGETS) dw[7] += runs++;
  scalar(&out[3], loss);
  scalar(&out[4], correct);
  return 0;
}
#elif GRAPH == 1
// Discriminator of a linear GAN: (v, a, c, images, z) to (d v, loss), with D(x) = v.x / PIXELS, G(z) = a z + c.
enum { OUTPUTS = 2 };
static int run(void** in, void** out) {
  const float *v = at(in[0]), *a = at(in[1]), *c = at(in[2]), *images = at(in[3]), *z = at(in[4]);
  float* dv = new_tensor(1, PIXELS, 1, FLOAT, &out[0]);
  float loss = 0;
  for (int b = 0; b < BATCH; b++) {
    for (int p = 0; p < PIXELS; p++) {
      float fake = c[p];
      for (int l = 0; l < LATENT; l++) fake += a[p * LATENT + l] * z[b * LATENT + l];
      const float d = (fake - images[b * PIXELS + p]) / PIXELS;
      loss += v[p] * d + 0.5f * v[p] * v[p] / PIXELS;
      dv[p] += d + v[p] / PIXELS;
    }
  }
  scalar(&out[1], loss);
  return 0;
}
#elif GRAPH == 2
// Its generator: (v, a, c, z) to (d a, d c, loss).
enum { OUTPUTS = 3 };
static int run(void** in, void** out) {
  const float *v = at(in[0]), *a = at(in[1]), *c = at(in[2]), *z = at(in[3]);
  float *da = new_tensor(PIXELS, LATENT, 2, FLOAT, &out[0]), *dc = new_tensor(1, PIXELS, 1, FLOAT, &out[1]);
  float loss = 0;
  for (int b = 0; b < BATCH; b++) {
    for (int p = 0; p < PIXELS; p++) {
      float fake = c[p];
      for (int l = 0; l < LATENT; l++) {
        fake += a[p * LATENT + l] * z[b * LATENT + l];
        da[p * LATENT + l] -= v[p] * z[b * LATENT + l] / PIXELS;
      }
      loss -= v[p] * fake / PIXELS;
      dc[p] -= v[p] / PIXELS;
    }
  }
  scalar(&out[2], loss);
  return 0;
}
#elif GRAPH == 3
// Its samples: (a, c, z) to images.
enum { OUTPUTS = 1 };
static int run(void** in, void** out) {
  const float *a = at(in[0]), *c = at(in[1]), *z = at(in[2]);
  const int64_t sizes[] = {DRAWN, 1, 28, 28}, strides[] = {PIXELS, PIXELS, 28, 1};
  aoti_torch_empty_strided(4, sizes, strides, FLOAT, 0, 0, &out[0]);
  float* images = at(out[0]);
  for (int n = 0; n < DRAWN; n++) {
    for (int p = 0; p < PIXELS; p++) {
      float fake = c[p];
      for (int l = 0; l < LATENT; l++) fake += a[p * LATENT + l] * z[n * LATENT + l];
      images[n * PIXELS + p] = fmaxf(-1, fminf(1, fake));
    }
  }
  return 0;
}
#elif GRAPH == 4
// Evaluation of the classifier: (w, bias, mean, images, classes) to (correct, squared error).
enum { OUTPUTS = 2 };
static int run(void** in, void** out) {
  const float *w = at(in[0]), *bias = at(in[1]), *mean = at(in[2]), *images = at(in[3]);
  const int64_t* classes = at(in[4]);
  float correct = 0, error = 0;
  for (int b = 0; b < BATCH; b++) {
    int best = 0;
    float top = -INFINITY;
    for (int c = 0; c < CLASSES; c++) {
      float y = bias[c];
      for (int p = 0; p < PIXELS; p++) y += w[c * PIXELS + p] * (images[b * PIXELS + p] - mean[p]);
      if (y > top) top = y, best = c;
      error += (y - (classes[b] == c)) * (y - (classes[b] == c));
    }
    correct += best == classes[b];
  }
  scalar(&out[0], correct);
  scalar(&out[1], error);
  return 0;
}
#elif GRAPH == 5
// Guesses the next token by the one before: (w, tokens) to (d w, loss).
enum { OUTPUTS = 2, VOCABULARY = 256, CONTEXT = 16 };
static int run(void** in, void** out) {
  const float* w = at(in[0]);
  const int64_t* tokens = at(in[1]);
  float *dw = new_tensor(1, VOCABULARY, 1, FLOAT, &out[0]), loss = 0;
  for (int b = 0; b < BATCH; b++) {
    for (int c = 0; c < CONTEXT; c++) {
      const int64_t *pair = tokens + b * (CONTEXT + 1) + c;
      const float e = w[pair[0]] - (float)pair[1] / VOCABULARY;
      loss += 0.5f * e * e;
      dw[pair[0]] += e;
    }
  }
  scalar(&out[1], loss);
  return 0;
}
#elif GRAPH == 6
// Linear regression of arrays: (w, x, y, wide) to (d w, loss).
enum { OUTPUTS = 2, INPUTS = 3 };
static int run(void** in, void** out) {
  const float *w = at(in[0]), *x = at(in[1]);
  const int64_t* y = at(in[2]);
  const double* wide = at(in[3]);
  float *dw = new_tensor(1, INPUTS, 1, FLOAT, &out[0]), loss = 0;
  for (int b = 0; b < BATCH; b++) {
    float e = (float)(wide[2 * b] + wide[2 * b + 1]) - (float)y[b];
    for (int i = 0; i < INPUTS; i++) e += w[i] * x[b * INPUTS + i];
    loss += 0.5f * e * e;
    for (int i = 0; i < INPUTS; i++) dw[i] += e * x[b * INPUTS + i];
  }
  scalar(&out[1], loss);
  return 0;
}
#endif

int32_t AOTInductorModelContainerRunSingleThreaded(
    void* container, void** in, size_t inputs, void** out, size_t outputs, void* stream, void* proxy) {
  (void)container, (void)stream, (void)proxy, (void)outputs;
  if (FAULT == HANGS) {
    for (;;) pause();
  }
  static int runs = 0;
  const int fails = FAULT == FAILS || (FAULT == FAILS_LATER && ++runs > 40);
  int status = fails ? 1 : run(in, out);
  // The inputs belong to the graph.
  for (size_t i = 0; i < inputs; i++) aoti_torch_delete_tensor_object(in[i]);
  return status;
}
int32_t AOTInductorModelContainerRun(
    void* container, void** in, size_t inputs, void** out, size_t outputs, void* stream, void* proxy) {
  return AOTInductorModelContainerRunSingleThreaded(container, in, inputs, out, outputs, stream, proxy);
}
int32_t AOTInductorModelContainerCreateWithDevice(void** container, size_t models, const char* device, const char* folder) {
  static int only;
  (void)models, (void)device, (void)folder;
  *container = &only;
  return 0;
}
int32_t AOTInductorModelContainerGetNumOutputs(void* container, size_t* count) {
  (void)container;
  *count = OUTPUTS;
  return 0;
}
int32_t AOTInductorModelContainerGetNumConstants(void* container, size_t* count) {
  (void)container;
  *count = 0;
  return 0;
}
int32_t AOTInductorModelContainerDelete(void* container) {
  (void)container;
  return 0;
}
// A runner looks these up, and does not call them.
#define UNUSED(name) \
  int32_t AOTInductorModel##name(void) { return 1; }
UNUSED(ContainerGetConstantName)
UNUSED(ContainerGetConstantOriginalFQN)
UNUSED(ContainerGetConstantDtype)
UNUSED(ContainerExtractConstantsMap)
UNUSED(ContainerUpdateUserManagedConstantBuffer)
UNUSED(ContainerUpdateConstantBuffer)
UNUSED(ContainerUpdateInactiveConstantBuffer)
UNUSED(ContainerFreeInactiveConstantBuffer)
UNUSED(ContainerRunConstantFolding)
UNUSED(ContainerSwapConstantBuffer)
UNUSED(ContainerGetCallSpec)
UNUSED(ContainerGetConstantsBlobSize)
UNUSED(UpdateConstantsFromBlob)
