package spirt

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/tensor"
)

// Keys of the metadata of a model file.
const (
	metaArchitecture = "spirt.architecture" // nn.Spec as JSON
	metaScale        = "spirt.scale"        // x = byte*scale + offset
	metaOffset       = "spirt.offset"
	metaModel        = "spirt.model" // the model hash
)

// maxModelFile bounds the size of a model file in bytes.
const maxModelFile = 16 << 30

// Trained is a trained model as a model file holds it: the architecture, its
// parameters (float32, in the order of Model.Views) and the normalisation of
// its input.
type Trained struct {
	Model         *nn.Model
	Parameters    []float32
	Scale, Offset float32 // x = byte*Scale + Offset
}

// Hash returns the model hash: the tree hash of the little-endian float32
// parameters.
func (t *Trained) Hash() treehash.Hash { return treehash.Sum(tensor.Bytes(t.Parameters)) }

// Write replaces the file at path with the model in safetensors format, one
// tensor to a parameter under its PyTorch name.
func (t *Trained) Write(path string) error {
	spec, err := json.Marshal(t.Model.Spec())
	if err != nil {
		return fmt.Errorf("encoding the architecture: %w", err)
	}
	var named []tensor.Named
	for _, v := range t.Model.Views() {
		named = append(named, tensor.Named{Name: v.Name, Tensor: tensor.FromFloats(v.Shape, v.Of(t.Parameters))})
	}
	var b bytes.Buffer
	err = tensor.WriteSafetensors(&b, named, map[string]string{
		"format":         "pt",
		metaArchitecture: string(spec),
		metaScale:        strconv.FormatFloat(float64(t.Scale), 'g', -1, 32),
		metaOffset:       strconv.FormatFloat(float64(t.Offset), 'g', -1, 32),
		metaModel:        t.Hash().String(),
	})
	if err != nil {
		return fmt.Errorf("encoding the model: %w", err)
	}
	return writeFileAtomic(path, b.Bytes(), 0o644)
}

// ReadModel reads a model file that Write wrote and checks it: every
// parameter present with its shape and finite, the model hash right.
func ReadModel(path string) (*Trained, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > maxModelFile {
		return nil, fmt.Errorf("model %s has %d bytes, more than the %d it may have", path, info.Size(), int64(maxModelFile))
	}
	t, err := decodeModel(f, info.Size())
	if err != nil {
		return nil, fmt.Errorf("model %s: %w", path, err)
	}
	return t, nil
}

func decodeModel(r io.ReaderAt, size int64) (*Trained, error) {
	named, meta, err := tensor.ReadSafetensors(r, size)
	if err != nil {
		return nil, err
	}
	var spec nn.Spec
	if meta[metaArchitecture] == "" {
		return nil, fmt.Errorf("no %s in the metadata: this file was not written by spirt", metaArchitecture)
	}
	if err := json.Unmarshal([]byte(meta[metaArchitecture]), &spec); err != nil {
		return nil, fmt.Errorf("%s in the metadata: %w", metaArchitecture, err)
	}
	model, err := nn.New(spec)
	if err != nil {
		return nil, fmt.Errorf("%s in the metadata: %w", metaArchitecture, err)
	}
	t := &Trained{Model: model}
	for key, dst := range map[string]*float32{metaScale: &t.Scale, metaOffset: &t.Offset} {
		v, err := strconv.ParseFloat(meta[key], 32)
		if err != nil || v-v != 0 { // NaN or infinite
			return nil, fmt.Errorf("%s in the metadata: %q is not a finite number", key, meta[key])
		}
		*dst = float32(v)
	}
	byName := make(map[string]tensor.Tensor, len(named))
	for _, n := range named {
		byName[n.Name] = n.Tensor
	}
	for _, v := range model.Views() { // before memory is taken for all of them
		if got := byName[v.Name]; got.DType != tensor.Float32 || !slices.Equal(got.Shape, v.Shape) {
			return nil, fmt.Errorf("parameter %s of shape %v and dtype float32 is missing", v.Name, v.Shape)
		}
	}
	t.Parameters = make([]float32, model.NumParams())
	for _, v := range model.Views() {
		copy(tensor.Bytes(v.Of(t.Parameters)), byName[v.Name].Data)
	}
	if i := tensor.NonFinite(t.Parameters); i >= 0 {
		return nil, fmt.Errorf("parameter %d is not finite", i)
	}
	if want := meta[metaModel]; want != t.Hash().String() {
		return nil, fmt.Errorf("the parameters have the model hash %s, the file says %s: the file is damaged", t.Hash(), want)
	}
	return t, nil
}

// evalBatch is the number of samples evaluated at a time.
const evalBatch = 200

// Evaluate returns the accuracy and the mean loss of the model over some rows
// of a data set.
func (t *Trained) Evaluate(data *dataset.Dataset, rows dataset.Range) (accuracy, loss float64, err error) {
	spec := t.Model.Spec()
	if err := data.Fits(spec.Input, spec.Classes); err != nil {
		return 0, 0, err
	}
	if rows.Len() == 0 {
		return 0, 0, fmt.Errorf("data: %s has no samples to evaluate on", data.Name)
	}
	normalised := *data
	normalised.Scale, normalised.Offset = t.Scale, t.Offset
	ws := t.Model.NewWorkspace(evalBatch)
	x := make([]float32, evalBatch*data.Stride())
	labels := make([]int32, evalBatch)
	var right int
	var sum float64
	for at := rows.Lo; at < rows.Hi; at += evalBatch {
		r := dataset.Range{Lo: at, Hi: min(at+evalBatch, rows.Hi)}
		normalised.Floats(x[:r.Len()*data.Stride()], r)
		for i, l := range data.Labels[r.Lo:r.Hi] {
			labels[i] = int32(l)
		}
		l, c := t.Model.Evaluate(t.Parameters, x[:r.Len()*data.Stride()], labels[:r.Len()], ws)
		sum, right = sum+l, right+c
	}
	return float64(right) / float64(rows.Len()), sum / float64(rows.Len()), nil
}

// Eval evaluates the model of the run in dir. With data "" it uses the job's
// own test samples, otherwise all samples of that data set.
func Eval(dir, data string) (Event, error) {
	t, err := ReadModel(filepath.Join(dir, modelFile))
	if err != nil {
		return Event{}, err
	}
	whole := data != ""
	if !whole {
		job, _, err := loadJob(dir)
		if err != nil {
			return Event{}, err
		}
		data = job.Data
	}
	d, err := dataset.Open(absoluteData(data))
	if err != nil {
		return Event{}, fmt.Errorf("data: %w", err)
	}
	rows := d.All()
	if !whole {
		_, _, rows = d.Split()
	}
	accuracy, loss, err := t.Evaluate(d, rows)
	if err != nil {
		return Event{}, err
	}
	return Event{Time: time.Now().UTC(), Event: "eval", Accuracy: &accuracy, Loss: &loss, Samples: rows.Len(), Model: t.Hash().String()}, nil
}
