"""The digest kernel as PTX: made from `digest.cu` by ``benchmarks/gpu/compile_digest.py``, not by hand."""

PTX = rb""".version 8.7
.target sm_70
.address_size 64
 // .globl chrek_digest
.visible .entry chrek_digest(
 .param .u64 chrek_digest_param_0,
 .param .u64 chrek_digest_param_1
)
.maxntid 256, 1, 1
{
 .reg .pred  %p<35>;
 .reg .b32  %r<76>;
 .reg .b64  %rd<132>;
 ld.param.u64  %rd26, [chrek_digest_param_0];
 ld.param.u64  %rd22, [chrek_digest_param_1];
 mov.u32  %r1, %ctaid.y;
 shl.b32  %r3, %r1, 1;
 cvta.to.global.u64  %rd27, %rd26;
 mul.wide.u32  %rd28, %r3, 8;
 add.s64  %rd1, %rd27, %rd28;
 ld.global.u64  %rd29, [%rd1+8];
 mov.u64  %rd129, 0;
 shr.u64  %rd2, %rd29, 4;
 mov.u32  %r4, %ntid.x;
 cvt.u64.u32  %rd3, %r4;
 mov.u32  %r5, %ctaid.x;
 mul.wide.u32  %rd30, %r5, %r4;
 mov.u32  %r2, %tid.x;
 cvt.u64.u32  %rd31, %r2;
 add.s64  %rd125, %rd30, %rd31;
 setp.ge.u64  %p1, %rd125, %rd2;
 mov.u64  %rd130, %rd129;
 mov.u64  %rd131, %rd129;
 @%p1 bra  $L__BB0_3;
 ld.global.u64  %rd5, [%rd1];
 mov.u64  %rd131, 0;
 mov.u32  %r6, %nctaid.x;
 cvt.u64.u32  %rd35, %r6;
 mul.lo.s64  %rd6, %rd35, %rd3;
 mov.u64  %rd130, %rd131;
 mov.u64  %rd129, %rd131;
$L__BB0_2:
 shl.b64  %rd36, %rd125, 4;
 add.s64  %rd37, %rd5, %rd36;
 ld.v2.u64  {%rd38, %rd39}, [%rd37];
 mul.lo.s64  %rd42, %rd125, 4354685564936845354;
 add.s64  %rd43, %rd42, %rd38;
 add.s64  %rd44, %rd42, %rd39;
 add.s64  %rd45, %rd43, -7046029254386353131;
 shr.u64  %rd46, %rd45, 33;
 xor.b64   %rd47, %rd46, %rd45;
 mul.lo.s64  %rd48, %rd47, -49064778989728563;
 shr.u64  %rd49, %rd48, 33;
 xor.b64   %rd50, %rd49, %rd48;
 mul.lo.s64  %rd51, %rd50, -4265267296055464877;
 shr.u64  %rd52, %rd51, 33;
 xor.b64   %rd53, %rd52, %rd51;
 add.s64  %rd54, %rd44, 4354685564936845354;
 shr.u64  %rd55, %rd54, 33;
 xor.b64   %rd56, %rd55, %rd54;
 mul.lo.s64  %rd57, %rd56, -49064778989728563;
 shr.u64  %rd58, %rd57, 33;
 xor.b64   %rd59, %rd58, %rd57;
 mul.lo.s64  %rd60, %rd59, -4265267296055464877;
 shr.u64  %rd61, %rd60, 33;
 xor.b64   %rd62, %rd61, %rd60;
 add.s64  %rd63, %rd62, %rd129;
 add.s64  %rd129, %rd63, %rd53;
 mov.u64  %rd64, 7046029254386353130;
 sub.s64  %rd65, %rd64, %rd42;
 xor.b64   %rd66, %rd38, %rd65;
 shr.u64  %rd67, %rd66, 33;
 xor.b64   %rd68, %rd67, %rd66;
 mul.lo.s64  %rd69, %rd68, -49064778989728563;
 shr.u64  %rd70, %rd69, 33;
 xor.b64   %rd71, %rd70, %rd69;
 mul.lo.s64  %rd72, %rd71, -4265267296055464877;
 shr.u64  %rd73, %rd72, 33;
 xor.b64   %rd74, %rd73, %rd72;
 mov.u64  %rd75, -4354685564936845355;
 sub.s64  %rd76, %rd75, %rd42;
 xor.b64   %rd77, %rd39, %rd76;
 shr.u64  %rd78, %rd77, 33;
 xor.b64   %rd79, %rd78, %rd77;
 mul.lo.s64  %rd80, %rd79, -49064778989728563;
 shr.u64  %rd81, %rd80, 33;
 xor.b64   %rd82, %rd81, %rd80;
 mul.lo.s64  %rd83, %rd82, -4265267296055464877;
 shr.u64  %rd84, %rd83, 33;
 xor.b64   %rd85, %rd84, %rd83;
 add.s64  %rd86, %rd85, %rd130;
 add.s64  %rd130, %rd86, %rd74;
 or.b64   %rd87, %rd39, %rd131;
 or.b64   %rd131, %rd87, %rd38;
 add.s64  %rd125, %rd125, %rd6;
 setp.lt.u64  %p2, %rd125, %rd2;
 @%p2 bra  $L__BB0_2;
$L__BB0_3:
 // begin inline asm
 mov.b64 {%r7,%r8}, %rd129;
 // end inline asm
 mov.u32  %r67, 2;
 mov.u32  %r68, 31;
 mov.u32  %r69, 16;
 mov.u32  %r70, -1;
 shfl.sync.down.b32  %r10|%p3, %r8, %r69, %r68, %r70;
 shfl.sync.down.b32  %r9|%p4, %r7, %r69, %r68, %r70;
 // begin inline asm
 mov.b64 %rd89, {%r9,%r10};
 // end inline asm
 add.s64  %rd94, %rd89, %rd129;
 // begin inline asm
 mov.b64 {%r11,%r12}, %rd130;
 // end inline asm
 shfl.sync.down.b32  %r14|%p5, %r12, %r69, %r68, %r70;
 shfl.sync.down.b32  %r13|%p6, %r11, %r69, %r68, %r70;
 // begin inline asm
 mov.b64 %rd91, {%r13,%r14};
 // end inline asm
 add.s64  %rd96, %rd91, %rd130;
 // begin inline asm
 mov.b64 {%r15,%r16}, %rd131;
 // end inline asm
 shfl.sync.down.b32  %r18|%p7, %r16, %r69, %r68, %r70;
 shfl.sync.down.b32  %r17|%p8, %r15, %r69, %r68, %r70;
 // begin inline asm
 mov.b64 %rd93, {%r17,%r18};
 // end inline asm
 or.b64   %rd98, %rd93, %rd131;
 // begin inline asm
 mov.b64 {%r19,%r20}, %rd94;
 // end inline asm
 mov.u32  %r71, 8;
 shfl.sync.down.b32  %r22|%p9, %r20, %r71, %r68, %r70;
 shfl.sync.down.b32  %r21|%p10, %r19, %r71, %r68, %r70;
 // begin inline asm
 mov.b64 %rd95, {%r21,%r22};
 // end inline asm
 add.s64  %rd100, %rd95, %rd94;
 // begin inline asm
 mov.b64 {%r23,%r24}, %rd96;
 // end inline asm
 shfl.sync.down.b32  %r26|%p11, %r24, %r71, %r68, %r70;
 shfl.sync.down.b32  %r25|%p12, %r23, %r71, %r68, %r70;
 // begin inline asm
 mov.b64 %rd97, {%r25,%r26};
 // end inline asm
 add.s64  %rd102, %rd97, %rd96;
 // begin inline asm
 mov.b64 {%r27,%r28}, %rd98;
 // end inline asm
 shfl.sync.down.b32  %r30|%p13, %r28, %r71, %r68, %r70;
 shfl.sync.down.b32  %r29|%p14, %r27, %r71, %r68, %r70;
 // begin inline asm
 mov.b64 %rd99, {%r29,%r30};
 // end inline asm
 or.b64   %rd104, %rd99, %rd98;
 // begin inline asm
 mov.b64 {%r31,%r32}, %rd100;
 // end inline asm
 mov.u32  %r72, 4;
 shfl.sync.down.b32  %r34|%p15, %r32, %r72, %r68, %r70;
 shfl.sync.down.b32  %r33|%p16, %r31, %r72, %r68, %r70;
 // begin inline asm
 mov.b64 %rd101, {%r33,%r34};
 // end inline asm
 add.s64  %rd106, %rd101, %rd100;
 // begin inline asm
 mov.b64 {%r35,%r36}, %rd102;
 // end inline asm
 shfl.sync.down.b32  %r38|%p17, %r36, %r72, %r68, %r70;
 shfl.sync.down.b32  %r37|%p18, %r35, %r72, %r68, %r70;
 // begin inline asm
 mov.b64 %rd103, {%r37,%r38};
 // end inline asm
 add.s64  %rd108, %rd103, %rd102;
 // begin inline asm
 mov.b64 {%r39,%r40}, %rd104;
 // end inline asm
 shfl.sync.down.b32  %r42|%p19, %r40, %r72, %r68, %r70;
 shfl.sync.down.b32  %r41|%p20, %r39, %r72, %r68, %r70;
 // begin inline asm
 mov.b64 %rd105, {%r41,%r42};
 // end inline asm
 or.b64   %rd110, %rd105, %rd104;
 // begin inline asm
 mov.b64 {%r43,%r44}, %rd106;
 // end inline asm
 shfl.sync.down.b32  %r46|%p21, %r44, %r67, %r68, %r70;
 shfl.sync.down.b32  %r45|%p22, %r43, %r67, %r68, %r70;
 // begin inline asm
 mov.b64 %rd107, {%r45,%r46};
 // end inline asm
 add.s64  %rd112, %rd107, %rd106;
 // begin inline asm
 mov.b64 {%r47,%r48}, %rd108;
 // end inline asm
 shfl.sync.down.b32  %r50|%p23, %r48, %r67, %r68, %r70;
 shfl.sync.down.b32  %r49|%p24, %r47, %r67, %r68, %r70;
 // begin inline asm
 mov.b64 %rd109, {%r49,%r50};
 // end inline asm
 add.s64  %rd114, %rd109, %rd108;
 // begin inline asm
 mov.b64 {%r51,%r52}, %rd110;
 // end inline asm
 shfl.sync.down.b32  %r54|%p25, %r52, %r67, %r68, %r70;
 shfl.sync.down.b32  %r53|%p26, %r51, %r67, %r68, %r70;
 // begin inline asm
 mov.b64 %rd111, {%r53,%r54};
 // end inline asm
 or.b64   %rd116, %rd111, %rd110;
 // begin inline asm
 mov.b64 {%r55,%r56}, %rd112;
 // end inline asm
 mov.u32  %r73, 1;
 shfl.sync.down.b32  %r58|%p27, %r56, %r73, %r68, %r70;
 shfl.sync.down.b32  %r57|%p28, %r55, %r73, %r68, %r70;
 // begin inline asm
 mov.b64 %rd113, {%r57,%r58};
 // end inline asm
 add.s64  %rd18, %rd113, %rd112;
 // begin inline asm
 mov.b64 {%r59,%r60}, %rd114;
 // end inline asm
 shfl.sync.down.b32  %r62|%p29, %r60, %r73, %r68, %r70;
 shfl.sync.down.b32  %r61|%p30, %r59, %r73, %r68, %r70;
 // begin inline asm
 mov.b64 %rd115, {%r61,%r62};
 // end inline asm
 add.s64  %rd19, %rd115, %rd114;
 // begin inline asm
 mov.b64 {%r63,%r64}, %rd116;
 // end inline asm
 shfl.sync.down.b32  %r66|%p31, %r64, %r73, %r68, %r70;
 shfl.sync.down.b32  %r65|%p32, %r63, %r73, %r68, %r70;
 // begin inline asm
 mov.b64 %rd117, {%r65,%r66};
 // end inline asm
 or.b64   %rd20, %rd117, %rd116;
 and.b32   %r74, %r2, 31;
 setp.ne.s32  %p33, %r74, 0;
 @%p33 bra  $L__BB0_6;
 mul.lo.s32  %r75, %r1, 3;
 cvta.to.global.u64  %rd118, %rd22;
 mul.wide.u32  %rd119, %r75, 8;
 add.s64  %rd21, %rd118, %rd119;
 atom.global.add.u64  %rd120, [%rd21], %rd18;
 add.s64  %rd121, %rd21, 8;
 atom.global.add.u64  %rd122, [%rd121], %rd19;
 setp.eq.s64  %p34, %rd20, 0;
 @%p34 bra  $L__BB0_6;
 add.s64  %rd123, %rd21, 16;
 atom.global.or.b64  %rd124, [%rd123], %rd20;
$L__BB0_6:
 ret;
}
"""
