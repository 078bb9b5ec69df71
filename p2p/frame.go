package p2p

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Frames on a message stream; docs/p2p.md has the offsets.
const (
	messageProtocol = "/spirt/message/1"

	frameHello     = 1
	frameMessage   = 2
	frameHeartbeat = 3
	frameHave      = 4
	frameWant      = 5
	frameBye       = 6
	frameAgain     = 7
	frameAges      = 8
	frameRelay     = 9

	frameHeader = 5 // length uint32, kind uint8
	helloSize   = 32 + 8
	haveEntry   = 32 + 2 + 8 + 1
	wantEntry   = 32
	maxEntries  = 1024 // in one have or want frame
)

var errOversize = errors.New("a frame over its bound")

type errKind byte

func (k errKind) Error() string { return fmt.Sprintf("a frame of unknown kind %d", byte(k)) }

// appendFrame appends one frame to dst.
func appendFrame(dst []byte, kind byte, payload []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(payload)))
	dst = append(dst, kind)
	return append(dst, payload...)
}

// frameBound returns the largest payload of a kind of frame.
func frameBound(kind byte, messageSize int) (int, error) {
	switch kind {
	case frameHello:
		return helloSize, nil
	case frameMessage:
		return messageSize, nil
	case frameHeartbeat:
		return bitsetSize(MaxIndex), nil
	case frameHave:
		return maxEntries * haveEntry, nil
	case frameWant:
		return maxEntries * wantEntry, nil
	case frameAges:
		return MaxIndex + 1, nil
	case frameRelay:
		return 1, nil
	case frameBye, frameAgain:
		return 0, nil
	}
	return 0, errKind(kind)
}

// readFrame reads one frame. The payload is in scratch, which grows as needed
// and is returned for the next call, except for messages, which get their own.
func readFrame(r io.Reader, messageSize int, scratch []byte) (kind byte, payload, scratchOut []byte, err error) {
	var head [frameHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, scratch, err
	}
	n, kind := binary.LittleEndian.Uint32(head[:]), head[4]
	bound, err := frameBound(kind, messageSize)
	if err != nil {
		return kind, nil, scratch, err
	}
	if uint64(n) > uint64(bound) {
		return kind, nil, scratch, fmt.Errorf("%w: kind %d, %d bytes, at most %d", errOversize, kind, n, bound)
	}
	if kind == frameMessage {
		payload = make([]byte, n)
	} else {
		if cap(scratch) < int(n) {
			scratch = make([]byte, n)
		}
		payload = scratch[:n]
	}
	if _, err := io.ReadFull(r, payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return kind, nil, scratch, err
	}
	return kind, payload, scratch, nil
}

// hello is the first frame in each direction.
type hello struct {
	job [32]byte
	run uint64 // drawn at start: tells a restarted peer from a second connection
}

func (h hello) append(dst []byte) []byte {
	dst = append(dst, h.job[:]...)
	return binary.LittleEndian.AppendUint64(dst, h.run)
}

func decodeHello(b []byte) (h hello, err error) {
	if len(b) != helloSize {
		return h, fmt.Errorf("a hello of %d bytes, not %d", len(b), helloSize)
	}
	copy(h.job[:], b)
	h.run = binary.LittleEndian.Uint64(b[32:])
	return h, nil
}

// bitset holds one bit for each member index; bit i is in byte i/8, and zero
// where there is no such byte.
type bitset []byte

func newBitset(highest int) bitset   { return make(bitset, bitsetSize(highest)) }
func (b bitset) set(i int)           { b[i/8] |= 1 << (i % 8) }
func (b bitset) clear(i int)         { b[i/8] &^= 1 << (i % 8) }
func (b bitset) has(i int) bool      { return i/8 < len(b) && b[i/8]&(1<<(i%8)) != 0 }
func bitsetSize(highest int) (n int) { return highest/8 + 1 }

// decodeRelay reads whether the sender wants what others sign passed on to it.
func decodeRelay(b []byte) (bool, error) {
	if len(b) != 1 || b[0] > 1 {
		return false, fmt.Errorf("a relay frame of % x", b)
	}
	return b[0] == 1, nil
}

// have names one kept message.
type have struct {
	id     [32]byte
	from   int
	slot   uint64
	sticky bool
}

func (e have) append(dst []byte) []byte {
	dst = append(dst, e.id[:]...)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(e.from))
	dst = binary.LittleEndian.AppendUint64(dst, e.slot)
	if e.sticky {
		return append(dst, 1)
	}
	return append(dst, 0)
}

// decodeHave appends the entries of a have frame to dst.
func decodeHave(dst []have, b []byte) ([]have, error) {
	if len(b)%haveEntry != 0 || len(b) > maxEntries*haveEntry {
		return dst, fmt.Errorf("a have-list of %d bytes: want a multiple of %d, at most %d", len(b), haveEntry, maxEntries*haveEntry)
	}
	for ; len(b) > 0; b = b[haveEntry:] {
		e := have{
			id:     [32]byte(b[:32]),
			from:   int(binary.LittleEndian.Uint16(b[32:])),
			slot:   binary.LittleEndian.Uint64(b[34:]),
			sticky: b[42] == 1,
		}
		if b[42] > 1 {
			return dst, fmt.Errorf("a have-list with a flag of %d", b[42])
		}
		dst = append(dst, e)
	}
	return dst, nil
}

// decodeWant appends the IDs of a want frame to dst.
func decodeWant(dst [][32]byte, b []byte) ([][32]byte, error) {
	if len(b)%wantEntry != 0 || len(b) > maxEntries*wantEntry {
		return dst, fmt.Errorf("a want-list of %d bytes: want a multiple of %d, at most %d", len(b), wantEntry, maxEntries*wantEntry)
	}
	for ; len(b) > 0; b = b[wantEntry:] {
		dst = append(dst, [32]byte(b[:32]))
	}
	return dst, nil
}

// Requests and answers on a body stream.
const (
	bodyProtocol = "/spirt/body/1"

	wantManifest = 1
	wantChunk    = 2
	wantPacked   = 3 // a chunk, which may be packed
	wantHoldings = 4

	statusOK      = 0
	statusAbsent  = 1
	statusBusy    = 2
	statusRefused = 3
	statusPacked  = 4

	requestSize = 32 + 8 + 1 + 4
)

// request asks for something of one body.
type request struct {
	hash treehash.Hash
	size int64
	kind byte
	// n is the chunk; where holdings are wanted, the number of chunks that the
	// asker knows to be there: the answer waits a moment until there are more.
	n int
}

func (r request) append(dst []byte) []byte {
	dst = append(dst, r.hash[:]...)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(r.size))
	dst = append(dst, r.kind)
	return binary.LittleEndian.AppendUint32(dst, uint32(r.n))
}

// decodeRequest checks everything that can be checked without the body.
func decodeRequest(b []byte, maxSize int64) (r request, err error) {
	if len(b) != requestSize {
		return r, fmt.Errorf("a body request of %d bytes, not %d", len(b), requestSize)
	}
	size := binary.LittleEndian.Uint64(b[32:])
	n := binary.LittleEndian.Uint32(b[41:])
	if size == 0 || size > uint64(maxSize) {
		return r, fmt.Errorf("a request for a body of %d bytes: want 1 to %d", size, maxSize)
	}
	chunks := uint64(treehash.NumChunks(int64(size)))
	switch b[40] {
	case wantManifest:
		if n != 0 {
			return r, fmt.Errorf("a manifest request with the number %d", n)
		}
	case wantChunk, wantPacked:
		if uint64(n) >= chunks {
			return r, fmt.Errorf("a request for chunk %d of %d", n, chunks)
		}
	case wantHoldings:
		if uint64(n) > chunks {
			return r, fmt.Errorf("a request for more than %d of %d chunks", n, chunks)
		}
	default:
		return r, fmt.Errorf("a body request of unknown kind %d", b[40])
	}
	return request{hash: treehash.Hash(b[:32]), size: int64(size), kind: b[40], n: int(n)}, nil
}

// decodeHoldings returns the bitmap of the chunks that a member holds, and
// their number.
func decodeHoldings(b []byte, chunks int) (bitset, int, error) {
	if len(b) != bitsetSize(chunks-1) {
		return nil, 0, fmt.Errorf("holdings of %d bytes, not %d", len(b), bitsetSize(chunks-1))
	}
	if rest := chunks % 8; rest != 0 && b[len(b)-1]>>rest != 0 {
		return nil, 0, errors.New("holdings beyond the last chunk")
	}
	count := 0
	for _, x := range b {
		count += bits.OnesCount8(x)
	}
	return b, count, nil
}
