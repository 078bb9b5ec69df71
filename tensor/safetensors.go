package tensor

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"unicode/utf8"
)

// Named is a tensor with its name in a file.
type Named struct {
	Name string
	Tensor
}

const (
	metadataKey = "__metadata__"
	// maxHeader is the bound that the reference implementation sets.
	maxHeader = 100_000_000
	// headerAlign makes the data start, and so every tensor lie, aligned.
	headerAlign = 8
)

// WriteSafetensors writes the tensors as a safetensors file: an 8-byte
// little-endian header length, a JSON header padded with spaces, and the data.
// Larger elements come first, so that each tensor is aligned; otherwise the
// order is kept. Names must be unique, valid UTF-8 and not "__metadata__".
func WriteSafetensors(w io.Writer, tensors []Named, metadata map[string]string) error {
	ordered := slices.Clone(tensors)
	slices.SortStableFunc(ordered, func(a, b Named) int {
		return cmp.Compare(b.DType.Size(), a.DType.Size())
	})
	var header bytes.Buffer
	header.WriteByte('{')
	comma := func() {
		if header.Len() > 1 {
			header.WriteByte(',')
		}
	}
	if len(metadata) > 0 {
		for k, v := range metadata {
			if !utf8.ValidString(k) || !utf8.ValidString(v) {
				return fmt.Errorf("writing safetensors: metadata %q is not valid UTF-8", k)
			}
		}
		text, err := json.Marshal(metadata) // sorts the keys
		if err != nil {
			return fmt.Errorf("writing safetensors: metadata: %w", err)
		}
		header.WriteString(`"` + metadataKey + `":`)
		header.Write(text)
	}
	seen := make(map[string]bool, len(ordered))
	offset := 0
	for _, t := range ordered {
		if err := t.Validate(); err != nil {
			return fmt.Errorf("writing safetensors: tensor %q: %w", t.Name, err)
		}
		if t.Name == metadataKey || seen[t.Name] || !utf8.ValidString(t.Name) {
			return fmt.Errorf("writing safetensors: tensor name %q is reserved, used twice or not UTF-8", t.Name)
		}
		seen[t.Name] = true
		name, err := json.Marshal(t.Name)
		if err != nil {
			return fmt.Errorf("writing safetensors: tensor %q: %w", t.Name, err)
		}
		comma()
		header.Write(name)
		fmt.Fprintf(&header, `:{"dtype":%q,"shape":[`, dtypes[t.DType].safetensors)
		for i, d := range t.Shape {
			if i > 0 {
				header.WriteByte(',')
			}
			header.WriteString(strconv.Itoa(d))
		}
		fmt.Fprintf(&header, `],"data_offsets":[%d,%d]}`, offset, offset+len(t.Data))
		offset += len(t.Data)
	}
	header.WriteByte('}')
	for header.Len()%headerAlign != 0 {
		header.WriteByte(' ')
	}
	if header.Len() > maxHeader {
		return fmt.Errorf("writing safetensors: a header of %d bytes, at most %d are allowed", header.Len(), maxHeader)
	}
	if _, err := w.Write(binary.LittleEndian.AppendUint64(nil, uint64(header.Len()))); err != nil {
		return fmt.Errorf("writing safetensors: %w", err)
	}
	if _, err := w.Write(header.Bytes()); err != nil {
		return fmt.Errorf("writing safetensors: %w", err)
	}
	for _, t := range ordered {
		if _, err := w.Write(t.Data); err != nil {
			return fmt.Errorf("writing safetensors: tensor %q: %w", t.Name, err)
		}
	}
	return nil
}

// ReadSafetensors reads a safetensors file of size bytes, checking every bound
// before it allocates: the data must be covered by the tensors without holes
// or overlaps. Tensors come in the order of their data, each with memory of
// its own. Element types other than F32, F16, U8 and I32 are refused.
func ReadSafetensors(r io.ReaderAt, size int64) ([]Named, map[string]string, error) {
	tensors, metadata, err := readSafetensors(r, size)
	if err != nil {
		return nil, nil, fmt.Errorf("reading safetensors: %w", err)
	}
	return tensors, metadata, nil
}

func readSafetensors(r io.ReaderAt, size int64) ([]Named, map[string]string, error) {
	var head [8]byte
	if size < int64(len(head)) {
		return nil, nil, fmt.Errorf("the file has %d bytes, a header alone has 8", size)
	}
	if err := readAt(r, head[:], 0); err != nil {
		return nil, nil, fmt.Errorf("header length: %w", err)
	}
	length := binary.LittleEndian.Uint64(head[:])
	if length > maxHeader || int64(length) > size-int64(len(head)) {
		return nil, nil, fmt.Errorf("header of %d bytes in a file of %d bytes (at most %d are allowed)", length, size, maxHeader)
	}
	text := make([]byte, length)
	if err := readAt(r, text, int64(len(head))); err != nil {
		return nil, nil, fmt.Errorf("header: %w", err)
	}
	start := int64(len(head)) + int64(length)
	entries, metadata, err := parseHeader(text, size-start)
	if err != nil {
		return nil, nil, err
	}
	tensors := make([]Named, len(entries))
	for i, e := range entries {
		data := make([]byte, e.end-e.begin)
		if err := readAt(r, data, start+e.begin); err != nil {
			return nil, nil, fmt.Errorf("tensor %q at offset %d: %w", e.name, start+e.begin, err)
		}
		tensors[i] = Named{e.name, Tensor{e.dtype, e.shape, data}}
	}
	return tensors, metadata, nil
}

type headerEntry struct {
	name       string
	dtype      DType
	shape      []int
	begin, end int64 // offsets into the data
}

// parseHeader reads the JSON header and checks that its tensors cover the
// dataLen bytes that follow. Entries come sorted by offset.
func parseHeader(text []byte, dataLen int64) ([]headerEntry, map[string]string, error) {
	if len(text) == 0 || text[0] != '{' {
		return nil, nil, errors.New("the header does not start with {")
	}
	if !utf8.Valid(text) {
		return nil, nil, errors.New("the header is not valid UTF-8")
	}
	var entries []headerEntry
	var metadata map[string]string
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	err := object(dec, func(key string) error {
		if key == metadataKey {
			metadata = make(map[string]string)
			return object(dec, func(k string) error {
				v, err := dec.Token()
				if err != nil {
					return err
				}
				s, ok := v.(string)
				if !ok {
					return fmt.Errorf("metadata %.64q is not a string", k)
				}
				metadata[k] = s
				return nil
			})
		}
		e, err := parseEntry(dec, key)
		if err != nil {
			return fmt.Errorf("tensor %.64q: %w", key, err)
		}
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("header at offset %d: %w", 8+dec.InputOffset(), err)
	}
	if rest := bytes.Trim(text[dec.InputOffset():], " "); len(rest) > 0 {
		return nil, nil, fmt.Errorf("header at offset %d: bytes after the JSON object", 8+dec.InputOffset())
	}
	slices.SortStableFunc(entries, func(a, b headerEntry) int {
		return cmp.Or(cmp.Compare(a.begin, b.begin), cmp.Compare(a.end, b.end))
	})
	at := int64(0)
	for _, e := range entries {
		if e.begin != at {
			return nil, nil, fmt.Errorf("tensor %.64q starts at data offset %d, not at %d: a hole or an overlap", e.name, e.begin, at)
		}
		at = e.end
	}
	if at != dataLen {
		return nil, nil, fmt.Errorf("the tensors have %d bytes, the file has %d: truncated or too long", at, dataLen)
	}
	return entries, metadata, nil
}

func parseEntry(dec *json.Decoder, name string) (headerEntry, error) {
	e := headerEntry{name: name}
	var offsets []int
	fields := 0
	err := object(dec, func(key string) (err error) {
		fields++
		switch key {
		case "dtype":
			var v json.Token
			if v, err = dec.Token(); err != nil {
				return err
			}
			for d, t := range dtypes {
				if d > 0 && v == t.safetensors {
					e.dtype = DType(d)
				}
			}
			if e.dtype == 0 {
				return fmt.Errorf("element type %.32v is not supported: use F32, F64, F16, BF16, I8, I16, I32, I64, U8, U16 or BOOL", v)
			}
		case "shape":
			e.shape, err = numbers(dec, MaxRank)
		case "data_offsets":
			if offsets, err = numbers(dec, 2); err == nil && len(offsets) != 2 {
				err = errors.New("data_offsets has not two numbers")
			}
		default:
			err = fmt.Errorf("unknown field %.32q", key)
		}
		return err
	})
	if err != nil {
		return e, err
	}
	if fields != 3 {
		return e, errors.New("dtype, shape or data_offsets is missing")
	}
	want, err := DataLen(e.dtype, e.shape)
	if err != nil {
		return e, err
	}
	e.begin, e.end = int64(offsets[0]), int64(offsets[1])
	if e.end < e.begin || e.end-e.begin != int64(want) {
		return e, fmt.Errorf("shape %v of %v needs %d bytes, its offsets are [%d, %d]", e.shape, e.dtype, want, e.begin, e.end)
	}
	return e, nil
}

// object reads one JSON object, calling value to read the value of each key. A
// key that comes twice is an error.
func object(dec *json.Decoder, value func(key string) error) error {
	if err := delim(dec, '{'); err != nil {
		return err
	}
	seen := make(map[string]bool)
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return err
		}
		key, ok := token.(string)
		if !ok || seen[key] {
			return fmt.Errorf("key %.64v comes twice or is no string", token)
		}
		seen[key] = true
		if err := value(key); err != nil {
			return err
		}
	}
	return delim(dec, '}')
}

// numbers reads a JSON array of at most limit unsigned numbers.
func numbers(dec *json.Decoder, limit int) ([]int, error) {
	if err := delim(dec, '['); err != nil {
		return nil, err
	}
	list := []int{}
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return nil, err
		}
		text, ok := token.(json.Number)
		if !ok {
			return nil, fmt.Errorf("%.32v is not a number", token)
		}
		n, err := strconv.ParseUint(string(text), 10, strconv.IntSize-1)
		if err != nil || len(list) == limit {
			return nil, fmt.Errorf("%.32v is out of range, or one number too many", text)
		}
		list = append(list, int(n))
	}
	return list, delim(dec, ']')
}

func delim(dec *json.Decoder, want json.Delim) error {
	token, err := dec.Token()
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	if token != want {
		return fmt.Errorf("found %.32v where %v was expected", token, want)
	}
	return nil
}

// readAt fills p: a file that ends early is an io.ErrUnexpectedEOF.
func readAt(r io.ReaderAt, p []byte, offset int64) error {
	n, err := r.ReadAt(p, offset)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
