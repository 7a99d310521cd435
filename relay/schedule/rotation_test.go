package schedule

import (
	"fmt"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/policy"
)

// TestWhoWaitsForASessionLosesNothing: with fewer connections than hosts and a
// rate, sessions go round. Who has mail for one host only waits for the runs of
// others each time, and has its share all the same: a tenant among tenants, and
// a stream among those of its tenant.
func TestWhoWaitsForASessionLosesNothing(t *testing.T) {
	for _, connections := range []int{1, 2, 4, 8, 20, 50} {
		for _, hosts := range []int{connections + 1, 4 * connections} {
			for _, streams := range []bool{false, true} {
				for _, weight := range []int{10, 30} {
					t.Run(fmt.Sprintf("%d connections/%d hosts/streams=%v/weight %d", connections, hosts, streams, weight), func(t *testing.T) {
						w := newWorld(t, 1, Limits{})
						w.s.SetPool(testPool(1), sources(1))
						w.s.SetShares(func(id ids.Tenant, stream string, _ policy.StreamKind) Share {
							share := Share{TenantWeight: DefaultWeight, StreamWeight: DefaultWeight, Priority: DefaultPriority}
							if id[15] == 2 {
								share.TenantWeight = weight
							}
							if stream == "one host" {
								share.StreamWeight = weight
							}
							return share
						})
						shape := perSecond(40)
						shape.SourceConnections = connections
						small := Queue(hosts)
						for d := range hosts {
							domain := fmt.Sprintf("d%d.test", d)
							w.route(domain, "p", domain, shape)
							w.takes[domain], w.dials[domain] = 10*time.Millisecond, 10*time.Millisecond
							w.add(Queue(d), testKey(1, policy.Bulk, domain), 1_000_000)
						}
						key := testKey(2, policy.Bulk, "d0.test")
						if streams {
							key = testKey(1, policy.Bulk, "d0.test")
							key.Stream = "one host"
						}
						w.add(small, key, 1_000_000)
						w.run(10 * time.Second)
						counts := map[bool]int{}
						w.onStart = func(q Queue) { counts[q == small]++ }
						w.run(30 * time.Second)
						total := counts[true] + counts[false]
						want := total * weight / (weight + DefaultWeight)
						if total < 1150 || counts[true] < want*9/10 || counts[true] > want*11/10 {
							t.Errorf("the mail of one host had %d of %d turns, its share is %d", counts[true], total, want)
						}
					})
				}
			}
		}
	}
}
