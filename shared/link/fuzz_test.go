package link

import (
	"encoding/binary"
	"testing"
)

// FuzzMuxFrames gives a server's session whatever a peer may send behind the
// handshake: it must keep its bounds until it names what is wrong.
func FuzzMuxFrames(f *testing.F) {
	frame := func(kind byte, id uint32, payload ...byte) []byte {
		b := binary.BigEndian.AppendUint32([]byte{kind}, id)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(payload))), payload...)
	}
	f.Add(frame(muxPing, 0))
	f.Add(append(frame(muxData, 1, 'a', 'b'), frame(muxClose, 1)...))
	f.Add(append(frame(muxData, 1), frame(muxCredit, 1, 0, 0, 1, 0)...))
	f.Add(append(frame(muxData, 7, 1), frame(muxData, 3, 1)...))
	f.Add(append(frame(muxClose, 1), frame(muxData, 2)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &muxSession{accept: make(chan *muxStream, maxStreams), done: make(chan struct{}), streams: make(map[uint32]*muxStream), nextID: 2}
		for len(b) >= muxHeadBytes {
			kind, id, size := b[0], binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:])
			b = b[muxHeadBytes:]
			if size > muxMaxData || int(size) > len(b) {
				return
			}
			payload := b[:size]
			b = b[size:]
			if s.handle(kind, id, payload) != "" {
				return
			}
			if s.peers > maxStreams || len(s.streams) != s.peers {
				t.Fatalf("%d streams of the peer's, %d in all", s.peers, len(s.streams))
			}
			for id, stream := range s.streams {
				if unread := len(stream.in) - stream.inOffset; unread > muxWindow || stream.window > muxWindow {
					t.Fatalf("stream %d holds %d bytes and may send %d", id, unread, stream.window)
				}
			}
		}
	})
}
