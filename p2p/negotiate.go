package p2p

import (
	"bytes"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p/core/protocol"
)

// Streams name their protocol with multistream-select 1.0, as libp2p does,
// without its round trip: the opener names one protocol and goes on at once.

const multistreamToken = "\x13/multistream/1.0.0\n"

// openerHead is what the opener of a stream sends first, and what it gets back
// where the other side speaks the protocol.
func openerHead(name string) []byte {
	token := append([]byte(multistreamToken), byte(len(name)+1))
	return append(append(token, name...), '\n')
}

// readHead checks the answer to openerHead.
func readHead(r io.Reader, name string) error {
	want := openerHead(name)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil {
		return fmt.Errorf("reading the answer to %s: %w", name, err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("it does not speak %s", name)
	}
	return nil
}

// acceptHead reads which of the protocols an opener names and agrees to it.
func acceptHead(rw io.ReadWriter, protocols ...string) (string, error) {
	var buf [64]byte
	head := buf[:len(multistreamToken)+1]
	if _, err := io.ReadFull(rw, head); err != nil {
		return "", err
	}
	n := int(head[len(multistreamToken)])
	if string(head[:len(multistreamToken)]) != multistreamToken || n > len(buf) {
		return "", fmt.Errorf("a stream that does not start with multistream-select: % x", head)
	}
	token := buf[:n]
	if _, err := io.ReadFull(rw, token); err != nil {
		return "", err
	}
	for _, p := range protocols {
		if string(token) == p+"\n" {
			_, err := rw.Write(openerHead(p))
			return p, err
		}
	}
	_, _ = io.WriteString(rw, multistreamToken+"\x03na\n") // the stream is given up either way
	return "", fmt.Errorf("a stream of unknown protocol %q", token)
}

func protocolID(name string) protocol.ID { return protocol.ID(name) }
